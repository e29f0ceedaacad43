"""`python -m llama_jax`, and what all programs of the repository share.

`program` runs a command and turns errors and signals into exit codes, `arguments` is the parser,
`completion` and `version` answer `--print-completion` and `--version`, `startup` comes before all imports.
`text`, `score`, `mask` and `quantize` are commands of `python -m llama_jax`.
"""
