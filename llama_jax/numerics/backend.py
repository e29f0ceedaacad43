"""The platform that a program is compiled for, which need not be the one that compiles it."""

import jax


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the ambient mesh's devices (`jax.set_mesh`), else JAX's default backend.

    JAX traces anew for a mesh of other devices, so what was chosen by this is never found in its caches
    for another platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
