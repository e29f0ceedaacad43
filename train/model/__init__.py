"""The model of a run.

`config` chooses its configuration; `restore` loads trained weights, of a run or a Hugging Face directory;
`evaluate` computes the validation loss, `sample` generates text, `export` writes a Hugging Face directory
and `verify` checks one with PyTorch.
"""
