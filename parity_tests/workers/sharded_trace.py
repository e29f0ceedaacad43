"""Record the independent Llama over eight devices, fsdp 4 x tensor 2. Run by `test_sharded_traces.py`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from llama_jax.files.json_object import read_json_object
from parity_tests.harness import independent_llama
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.traces.record_jax import record_jax

use_host_devices(8)


def sharded(mesh: jax.sharding.Mesh, array: jax.Array) -> jax.Array:
    """Matrices are split over both axes of the mesh, as far as they can be."""
    sizes = dict(zip(("fsdp", "tensor"), (4, 2), strict=True))
    axes = [
        axis if array.ndim > 1 and size % sizes[axis] == 0 else None
        for axis, size in zip(sizes, (array.shape[0], array.shape[-1]), strict=True)
    ]
    spec = PartitionSpec(axes[0], *[None] * (array.ndim - 2), *axes[1 : array.ndim])
    return jax.device_put(array, NamedSharding(mesh, spec))


def main(directory: Path, out: Path) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    config = read_json_object(directory / "config.json")
    weights = load_file(directory / "model.safetensors")
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (4, 24)).astype(np.int32)
    params = independent_llama.params_of(config, weights, jnp.float32)
    params = jax.tree.map(lambda array: sharded(mesh, array), params)
    tokens = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("fsdp")))
    with jax.set_mesh(mesh):
        record_jax(
            lambda params: independent_llama.loss(config, params, tokens),
            params,
            out,
            inputs={"input_ids": ids},
            names=independent_llama.names(config),
            weights=lambda params: independent_llama.to_hugging_face(config, params),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
