"""The Triton kernels on eight host devices, run as plain JAX, against one.

Run by `test_attention_triton_sharded.py`. Prints JSON lines: how far output and gradients are from those
of one device.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from llama_jax.attention import dispatch
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.library.attention.triton_cases import SMALL, fused, mask_of, operands
from parity_tests.reference.errors import relative_error

use_host_devices(8)

jax.config.update("jax_numpy_dtype_promotion", "strict")
# the kernels are for GPUs; here the host devices stand for them
dispatch.target_platform = lambda: "gpu"
dispatch._RUN["triton"] = partial(dispatch._RUN["triton"], kernels=SMALL)

BATCH, SEQ, DIM = 8, 132, 32
# axes of the mesh, heads, kv heads
CASES = {
    "data2-tensor4-kv2": ({"data": 2, "tensor": 4}, 4, 2),
    "fsdp2-sequence2-tensor2": ({"fsdp": 2, "sequence": 2, "tensor": 2}, 4, 2),
}


@partial(jax.jit, compiler_options=FAST_COMPILE)
def sharded(arrays, mask):
    *inputs, gradient = arrays
    out, pull = jax.vjp(lambda *a: dispatch.attention(*a, mask)[0], *inputs)
    return [out, *pull(gradient)]


def main() -> None:
    for name, (sizes, heads, kv_heads) in CASES.items():
        arrays = operands(SEQ, SEQ, heads, kv_heads, DIM, jnp.bfloat16, batch=BATCH)
        mask = mask_of("left packed right", SEQ, batch=BATCH)
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
        expected = fused(arrays, mask)
        with jax.set_mesh(mesh):
            kernels = str(jax.make_jaxpr(sharded.__wrapped__)(arrays, mask)).count("pallas_call[")
            result = sharded(arrays, mask)
        pairs = zip(result, expected, strict=True)
        errors = [
            relative_error(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs
        ]
        print(json.dumps({"case": name, "errors": errors, "kernels": kernels}), flush=True)


if __name__ == "__main__":
    main()
