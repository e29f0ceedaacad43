"""Compile the Triton kernels for GPUs that are not here, and a model that uses them.

Run by `test_attention_triton_gpu.py` with an empty directory and cases such as h100-128-bfloat16 and
h100-model-dots. Prints what ptxas says of every kernel, or for a model, the kernel calls in the compiled
program.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

os.environ["XLA_FLAGS"] = f"--xla_dump_to={sys.argv[1]}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax import LlamaConfig, LlamaForCausalLM, init_cache
from llama_jax.attention.dispatch import attention
from llama_jax.attention.masks import AttentionMask
from train.hardware.gpu_topology import gpu_devices
from train.hardware.gpus import GPUS

DUMP = Path(sys.argv[1])


def main() -> None:
    for case in sys.argv[2:]:
        gpu, *what = case.split("-")
        if what[0] == "model":
            result = model_calls(devices(gpu, 4), what[1])
        else:
            result = kernel_resources(gpu, int(what[0]), jnp.dtype(what[1]))
        print(json.dumps({"case": case, "kernels": result}), flush=True)


@cache
def devices(gpu: str, count: int) -> list[jax.Device]:
    return gpu_devices(GPUS[gpu], 1, count)


def kernel_resources(gpu: str, dim: int, dtype: jnp.dtype) -> dict[str, dict[str, int]]:
    """Registers, bytes spilled and bytes of shared memory of the three kernels."""
    # 4:1, packed, with padding; a length that no block divides
    query, key, ids = (1, 1000, 8, dim), (1, 1000, 2, dim), (1, 1000)
    mesh = Mesh(np.array(devices(gpu, 1)), ("data",), (AxisType.Auto,))

    def energy(operands, segments):
        mask = AttentionMask(None, None, segments > 0, segments, segments)
        out = attention(*operands, mask, implementation="triton")[0]
        return out.astype(jnp.float32).sum()

    for path in DUMP.iterdir():
        path.unlink()
    shapes = [replicated(mesh, shape, dtype) for shape in (query, key, key)]
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(energy)).lower(shapes, replicated(mesh, ids, jnp.int32)).compile()
    major, minor = GPUS[gpu].capability
    arch = f"sm_{major}{minor}{'a' if major >= 9 else ''}"
    result = {}
    for path in DUMP.glob("*.ptx"):
        if (name := re.search(r"\.entry (attention_\w+)", path.read_text())) is not None:
            result[name[1]] = assemble(path, arch)
    for name, size in re.findall(r"(attention_\w+) grid.*shared_memory: (\d+)", thunks()):
        result[name]["shared"] = int(size)
    return result


def assemble(ptx: Path, arch: str) -> dict[str, int]:
    command = ["ptxas", "-v", f"-arch={arch}", ptx, "-o", os.devnull]
    says = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", says)
    registers = re.search(r"Used (\d+) registers", says)
    assert spilled is not None, says
    assert registers is not None, says
    return {"registers": int(registers[1]), "spilled": int(spilled[1]) + int(spilled[2])}


def thunks() -> str:
    """What XLA says of each kernel that it launches."""
    return "".join(path.read_text() for path in DUMP.glob("*.thunk_sequence.txt"))


def model_calls(gpus: list[jax.Device], what: str) -> dict[str, int]:
    """The calls of each kernel in a model's compiled program, by default; layers of a scan are one.

    Args:
        what: "prefill" into a cache, or the remat policy of a loss and its gradients.
    """
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    cache = jax.eval_shape(lambda: init_cache(config, 4, 1000, jnp.bfloat16))
    mesh = Mesh(np.array(gpus).reshape(2, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)

    def loss(model, ids, segments):
        return model(ids, labels=ids, segment_ids=segments, remat=what).loss

    def prefill(model, ids, is_token, cache):
        out = model(ids, attention_mask=is_token, cache=cache)
        return out.logits, out.cache

    ids = jax.ShapeDtypeStruct((4, 640), jnp.int32)
    run, arguments = (
        (prefill, (model, ids, ids, cache))
        if what == "prefill"
        else (jax.grad(loss), (model, ids, ids))
    )
    shapes = jax.tree.map(lambda leaf: replicated(mesh, leaf.shape, leaf.dtype), arguments)
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(*shapes).compile().as_text()
    assert not re.search(r"\[[\d,]*640,(640|1000)\]", text), "scores"
    calls = re.findall(r'custom_call_target="__gpu\$xla.gpu.triton".*?(attention_\w+)', text)
    return {name: calls.count(name) for name in set(calls)}


def replicated(mesh: Mesh, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


if __name__ == "__main__":
    main()
