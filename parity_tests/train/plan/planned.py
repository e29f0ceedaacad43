"""Run by `test_plan.py` in a process of eight host devices; prints one JSON object."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.inspection.architecture import forward_flops_per_token
from llama_jax.presets import PRESETS
from llama_jax.sharding import MESH_AXES
from train.__main__ import main
from train.hardware.collectives import collectives
from train.hardware.topology import host_devices
from train.options import MeshOptions, ModelOptions, RunOptions
from train.plan.compiled import device_bytes, make_plan
from train.plan.search import candidates, search
from train.program.build import run_program

DEVICES = host_devices(8)

CONFIG = replace(PRESETS["tiny-4m"], hidden_size=64, intermediate_size=96, vocab_size=128)
OPTIONS = RunOptions(
    batch_size=16,
    sequence_length=32,
    model=ModelOptions(compute_dtype="float32"),
    mesh=MeshOptions(data=1, fsdp=4, tensor=2),
)


def collectives_of(function, shape, spec, out_spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    run = jax.jit(function(mesh), out_shardings=NamedSharding(mesh, out_spec))
    by_kind = collectives(run.lower(array).compile().as_text())
    return {kind: [c.count, c.bytes, c.sent] for kind, c in by_kind.items()}


def summed(mesh):
    return jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P())


def in_pairs(mesh):
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]

    def local(x):
        return jax.lax.psum(x, "x", axis_index_groups=groups)

    return jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)


def passed_on(mesh):
    ring = [(device, (device + 1) % 8) for device in range(8)]

    def local(x):
        return jax.lax.ppermute(x, "x", ring)

    return jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"))


def gathered_in_a_loop(mesh):
    def local(x):
        def body(total, row):
            return total + jnp.sum(jax.lax.all_gather(row, "x") ** 2), None

        return jax.lax.scan(body, jnp.zeros(()), x)[0]

    return jax.shard_map(local, mesh=mesh, in_specs=P(None, "x"), out_specs=P(), check_vma=False)


def plan_of(options):
    plan = make_plan(options, CONFIG, DEVICES)
    program = run_program(options, CONFIG, DEVICES)
    with jax.set_mesh(program.mesh):
        arguments = program.params, program.opt_state, program.batch, None
        stats = program.step.lower(*arguments).compile().memory_analysis()
    placed = jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        (program.params, program.opt_state),
    )
    held = [
        sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for tree in placed
    ]
    return {
        "memory": plan.memory._asdict(),
        "peak": plan.peak,
        "stats": {
            name: getattr(stats, f"{name}_size_in_bytes")
            for name in ("argument", "output", "alias", "temp")
        },
        "held": held,
        "batch": device_bytes(program.batch),
        "attention": plan.attention,
        "fits": plan.fits,
        "flops": plan.flops_per_token,
        "forward": forward_flops_per_token(CONFIG, options.sequence_length),
        "counted": plan.counted_flops_per_token,
        "alternative": plan.alternative,
        "sent": sum(collective.sent for collective in plan.collectives),
        "collectives": [collective.kind for collective in plan.collectives],
    }


def search_result():
    ordered = candidates(OPTIONS, CONFIG, DEVICES)
    reported = []
    plans = search(
        OPTIONS, CONFIG, DEVICES, limit=2, report=lambda plan: reported.append(plan.peak)
    )
    return {
        "candidates": [
            [{axis: getattr(options.mesh, axis) for axis in MESH_AXES}, options.model.remat]
            for options in ordered
        ],
        "plans": [plan.peak for plan in plans],
        "reported": reported,
    }


def command_result():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        small = "--model.preset tiny-4m --batch-size 16 --sequence-length 32 --mesh.fsdp 8"
        code = main(["plan", "--host-devices", "8", *small.split(), "--json", str(file)])
        return {"code": code, "json": json.loads(file.read_text())}


def outcomes() -> dict:
    changes_by_name = {
        "full": {"remat": "full"},
        "none": {"remat": "none"},
        "micro": {"remat": "none"},
    }
    plans = {}
    for name, changes in changes_by_name.items():
        model = replace(OPTIONS.model, **changes)
        micro_batches = 2 if name == "micro" else 1
        plans[name] = plan_of(replace(OPTIONS, model=model, micro_batches=micro_batches))
    return {
        "psum": collectives_of(summed, (8, 128), P("x"), P()),
        "pairs": collectives_of(in_pairs, (8, 128), P("x"), P("x")),
        "ring": collectives_of(passed_on, (8, 128), P("x"), P("x")),
        "loop": collectives_of(gathered_in_a_loop, (5, 64), P(None, "x"), P()),
        "plans": plans,
        "search": search_result(),
        "command": command_result(),
    }


if __name__ == "__main__":
    print("\n" + json.dumps(outcomes()))
