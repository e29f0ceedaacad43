"""A process with several devices, all of them the host's CPU."""

import os

import jax

from llama_jax.numerics.xla_options import reserve_host_threads


def use_host_devices(count: int, *flags: str) -> None:
    """Make `count` devices of the CPU; to be called before JAX looks for devices.

    Args:
        flags: further ones of XLA's.
    """
    devices = f"--xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = " ".join((devices, *flags))
    reserve_host_threads()
    jax.config.update("jax_platforms", "cpu")
    assert jax.device_count() == count, "JAX has looked for devices before"
