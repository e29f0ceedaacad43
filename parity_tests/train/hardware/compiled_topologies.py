"""Devices of topologies, and a gather compiled for one. Run by `test_tpu_topology.py`."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from train.hardware.collectives import collectives
from train.hardware.topology import topology_devices
from train.program.mesh import make_mesh

TOPOLOGIES = {"one": ["v5p:2x2x1"], "all": ["v4:2x2x2", "v5e:1x1", "2xv6e:2x4", "v5p:4x4x4"]}


def gathered(devices) -> dict[str, tuple[int, int]]:
    """Count and bytes of the collectives, by kind, of gathering a matrix that is split over all devices."""
    mesh = make_mesh({"fsdp": len(devices)}, devices)
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64 * len(devices), 4096), jnp.bfloat16, sharding=split)
    text = jax.jit(lambda x: x, out_shardings=whole).lower(x).compile().as_text()
    return {kind: (found.count, found.bytes) for kind, found in collectives(text).items()}


def main() -> None:
    for name in TOPOLOGIES[sys.argv[1]]:
        devices = topology_devices(name)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        kinds = gathered(devices) if name == "v5p:4x4x4" else {}
        print(json.dumps((name, (len(devices), devices[0].device_kind, slices, kinds))))


if __name__ == "__main__":
    main()
