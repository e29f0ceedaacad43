"""What a program that holds a whole training step tells the compiler."""

from llama_jax.numerics.backend import target_platform


def step_compiler_options(platform: str | None = None) -> dict[str, str]:
    """`compiler_options` of `jax.jit` for a step on `platform`, by default the one compiled for.

    On the CPU, XLA widens a bfloat16 array that a loop reads a slice of to float32, whole, before the loop:
    every residual and weight of the layers, twice its size. Without that pass they stay as they are.
    """
    if (platform or target_platform()) != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
