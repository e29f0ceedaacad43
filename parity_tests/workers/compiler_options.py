"""Compile a small program for a topology with the options of a training step.

Run by `test_xla_options.py`. Prints {"compiled": options}, or {"missing": why} where the compiler is not
installed.
"""

import json
import sys

import jax
import jax.numpy as jnp

from llama_jax.numerics.xla_options import step_compiler_options
from train.hardware.topology import topology_devices


def main() -> None:
    try:
        device, *_ = topology_devices(sys.argv[1])
    except ValueError as error:
        if "installed" not in str(error):
            raise
        print(json.dumps({"missing": str(error)}))
        return
    options = step_compiler_options(device.platform, across_hosts=True, deterministic=True)
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=sharding)
    jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile()
    print(json.dumps({"compiled": options | {"platform": device.platform}}))


if __name__ == "__main__":
    main()
