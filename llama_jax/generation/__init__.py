"""Text generation: a prefill and a loop of decoding steps.

`loop` generates and streams; `prompt_cache` keeps keys and values for the next prompt; `sampling` filters
logits and chooses tokens; `config` reads generation_config.json; `unstacked` prepares a model for fast
decoding on a CPU.
"""
