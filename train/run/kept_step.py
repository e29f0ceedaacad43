"""The compiled step in a file, with which a run that starts again neither traces nor compiles it.

JAX's own cache of compiled programs is asked with the lowered program, which takes a second to make. These
files are beside it, in a folder that only this user can write: they have native code, and objects of JAX
pickled by JAX. One is read only if it is complete, and all that determines the step is the same: options,
shapes, devices, versions, variables of the environment, and the sources of this program.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.tree_util import keystr

import llama_jax
import train
from llama_jax.cli.compiled_programs import program_folder
from llama_jax.files.kept_code import read_code, write_code
from llama_jax.numerics.cpu.available import load_kernel, tiled_kernel
from train.options import RunOptions
from train.program.build import Program

# of a run, what its step does not depend on
_UNRELATED = {"out", "data", "log", "checkpoint", "evaluation", "export_every", "seed"}
_VARIABLES = "JAX_", "XLA_", "LIBTPU_", "TF_", "NUMBA_", "NPROC"


def kept_step_file(
    program: Program, options: RunOptions, name: str, dropout_key: Any
) -> Path | None:
    """Where a step is kept, or would be; None where it is not.

    Only `python -m train` keeps it: in another program, functions may be others than the sources say. Only
    single processes on a CPU have been tried.

    Args:
        name: `step` or `statistics_step`, as in `Program`.
        dropout_key: of a step, for its type.
    """
    folder, spec = program_folder(), getattr(sys.modules["__main__"], "__spec__", None)
    devices = list(program.mesh.devices.flat)
    if folder is None or spec is None or spec.name != "train.__main__":
        return None
    if jax.process_count() > 1 or devices[0].platform != "cpu":
        return None
    unrelated = dict.fromkeys(_UNRELATED)
    config = {option: v for option, v in jax.config.values.items() if "cache" not in option}
    arguments = _arguments(program, dropout_key)
    of = {
        "step": name,
        "versions": [sys.version, *(m.__version__ for m in (jax, jaxlib, flax, optax, np))],
        "sources": [_digest(package) for package in (llama_jax, train)],
        "variables": {v: os.environ[v] for v in sorted(os.environ) if v.startswith(_VARIABLES)},
        "jax": config,
        "devices": [f"{device} {device.device_kind}" for device in devices],
        "kernel": tiled_kernel() is not None,
        "model": program.config.to_dict(),
        "options": dataclasses.asdict(options) | unrelated,
        "structure": jax.tree.structure(arguments),
        "arrays": [
            (keystr(path), leaf.shape, leaf.dtype, leaf.sharding)
            for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]
        ],
    }
    key = hashlib.sha256(json.dumps(of, default=str, sort_keys=True).encode()).hexdigest()
    return folder / "steps" / key


def load_step(file: Path, program: Program) -> jax.stages.Compiled | None:
    """The step that `keep_step` wrote, None if there is none that can be used."""
    try:
        kept = read_code(file)
        if kept is None:
            return None
        kernels, code, in_tree, out_tree = kept
        if not all(map(load_kernel, kernels)):
            return None
        devices = list(program.mesh.devices.flat)
        return deserialize_and_load(code, in_tree, out_tree, devices[0].client, devices)
    except Exception:  # whatever is wrong with it, the step can be compiled
        return None


def keep_step(file: Path, compiled: jax.stages.Compiled, kernels: Sequence[str]) -> None:
    """Write a step that XLA has compiled in this process; nothing is said where that is not possible.

    Args:
        kernels: that it may call, of `llama_jax.numerics.cpu.available.loaded_kernels`.
    """
    with suppress(Exception):  # JAX cannot serialize all, and the disk may be full
        write_code(file, (kernels, *serialize(compiled)))


def _arguments(program: Program, dropout_key: Any) -> Any:
    return program.params, program.opt_state, program.batch, dropout_key


def _digest(package: Any) -> str:
    """Of all sources of a package."""
    folder = Path(package.__file__).parent
    files = sorted(folder.rglob("*.py"))
    parts = [str(f.relative_to(folder)).encode() + b"\0" + f.read_bytes() for f in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
