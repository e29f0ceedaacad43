"""Programs to start from; each runs by itself: `python examples/NAME.py`.

`quickstart` loads a checkpoint and compares it with PyTorch; `pretrain_on_your_text` and
`continue_from_checkpoint` train; `your_own_training_loop` and `fused_loss_in_your_jax_program` use the
library in programs of your own; `score_and_generate` runs batches; `demo/` is what `make demo` runs.
"""
