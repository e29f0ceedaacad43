"""The models: a decoder and the heads on top of it.

`decoder` is `LlamaModel`, a scan over the `layers`. `causal_lm` adds the language-model head, the loss
and generation; `sequence_classification`, `token_classification` and `question_answering` are
transformers' task models, on a `task_head`. `pretrained` loads and saves all of them. `lm_head` has heads
for models of your own.
"""
