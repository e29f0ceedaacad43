"""The platform that a program is compiled for, and the compiler options that go with it."""

import jax

# Of a GPU's memory, what XLA takes at its start; the rest is for CUDA's context, NCCL and cuDNN. JAX's own
# default is 0.75; 0.9 is what NVIDIA sets for training (JAX-Toolbox, "Tips for High-Performance LLMs").
GPU_MEMORY_FRACTION = 0.9


def target_platform() -> str:
    """Name the platform, "cpu", "gpu" or "tpu": of the ambient mesh (`jax.set_mesh`) or JAX's default.

    This need not be the platform that compiles. JAX traces anew for a mesh of other devices, so a program
    that was chosen by this is never taken from its caches for another platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def gpu_capability() -> str | None:
    """CUDA's compute capability of the GPUs that a program is compiled for: "9.0" for Hopper.

    None where it is not known: on another platform, and for GPUs that are not here.
    """
    if target_platform() != "gpu" or jax.default_backend() != "gpu":
        return None
    target = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if target is None else target.device_kind
    here = (device for device in jax.devices() if device.device_kind == kind)
    return next((str(device.compute_capability) for device in here), None)


def step_compiler_options(platform: str | None = None) -> dict[str, str]:
    """`compiler_options` of `jax.jit` for a training step on `platform` (default: `target_platform()`).

    On CPU, XLA hoists the conversion of a bfloat16 array to float32 out of a loop that reads slices of it:
    the residuals and the stacked weights would be held twice as large. Without that pass they stay narrow.
    """
    if (platform or target_platform()) != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
