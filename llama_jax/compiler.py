"""What a program that holds a whole training step tells the compiler."""

import jax


def step_compiler_options() -> dict[str, str]:
    """`compiler_options` of `jax.jit` for a step of the default backend.

    On the CPU, XLA widens a bfloat16 array that a loop reads a slice of to float32, whole, before the loop:
    every residual and weight of the layers, twice its size. Without that pass they stay as they are.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
