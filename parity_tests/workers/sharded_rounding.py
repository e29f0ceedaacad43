"""Rounding over meshes of eight host devices; prints JSON lines. Run by `test_tensor_parallel.py`."""

import json

import jax
import torch
from jax.sharding import AxisType

from parity_tests.harness.cases import Inputs, case
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.harness.rounding import pooled_errors

use_host_devices(8)

jax.config.update("jax_numpy_dtype_promotion", "strict")

INPUTS = Inputs(batch=2, length=16)
CASES = {
    "tensor4": ({"tensor": 4}, case("plain", INPUTS, num_key_value_heads=4)),
    "fsdp2-sequence2-tensor2": (
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        case("biases", INPUTS, attention_bias=True, mlp_bias=True, hidden_size=64),
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    for name, (sizes, llama) in CASES.items():
        axes = (AxisType.Auto,) * len(sizes)
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axes)
        for dtype_name, dtype in DTYPES.items():
            with jax.set_mesh(mesh):
                errors = pooled_errors(llama, 10, dtype)
            print(json.dumps({"case": f"{name}-{dtype_name}", "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
