"""Conversions: planned, run a tensor at a time, verified, and only then renamed into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert import record
from convert.adapter import Rounding, with_adapter
from convert.casting import Changes
from convert.checkpoint import Checkpoint, dtype_name
from convert.companions import tokenizer_facts
from convert.estimate import seconds
from convert.formats import huggingface, registry
from convert.formats.registry import FORMATS, writable
from convert.proof import read_back
from convert.renaming import read_rename
from convert.surgery import Surgery, operate
from convert.surgery.shards import shard_size_for
from convert.verify_logits import Comparison, compare_logits, require_torch_and_memory
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.files.buffers import kept_heap, reused_buffers
from llama_jax.files.direct import reading_directly
from llama_jax.files.page_cache import fits_page_cache, forgetting
from llama_jax.files.paths import destination_path, local_path, source_path
from llama_jax.files.remote import is_remote, remote_path
from llama_jax.files.scratch import scratch_in
from llama_jax.files.staging import move, staging_in, to_disk
from llama_jax.files.upload import require_absent, uploading, write_bytes

DEFAULT_SHARD = huggingface.DEFAULT_SHARD
_SPARE = 1_000_000  # bytes of disk beyond the tensors and the files beside: headers, the index
_BASE_MEMORY = 600_000_000  # Python, JAX, TensorStore


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked but not begun: what it will read, write and cost."""

    source: Path
    checkpoint: Checkpoint
    destination: Path
    to: str
    """A key of FORMATS."""
    dtype: str | None
    """To write; None: each tensor's own."""
    specs: tuple[TensorSpec, ...]
    """The tensors as the target's own reader will return them."""
    max_shard_size: int
    verify: bool
    logits: bool
    scan_layers: bool = True
    rounding: Rounding | None = None
    """Of the adapter's merge, counted while it runs."""

    @property
    def notes(self) -> list[str]:
        """What the user should know before it begins."""
        return [*self.checkpoint.notes, *FORMATS[self.to].module.losses(self.checkpoint)]

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all tensors in the output."""
        stored_bytes = FORMATS[self.to].module.stored_bytes
        return sum(stored_bytes(spec, self.dtype) for spec in self.specs)

    @property
    def peak_memory(self) -> int:
        """Bytes that are certainly enough: the program, and three times the largest tensor."""
        return _BASE_MEMORY + 3 * self.largest

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor, as it is read or written."""
        return max(spec.nbytes for spec in (*self.checkpoint.tensors, *self.specs))

    @property
    def workplace(self) -> Path:
        """The local directory in which the output is made: of the destination, or one to upload from."""
        remote = is_remote(self.destination)
        return Path(tempfile.gettempdir()) if remote else self.destination.parent

    @property
    def spare_disk(self) -> int:
        """Bytes that are free beyond those of the output; negative where it has too little space."""
        needed = self.bytes_to_write + _SPARE + sum(map(len, self.checkpoint.files.values()))
        return shutil.disk_usage(self.workplace).free - needed

    @property
    def seconds(self) -> float:
        """An estimate, from a short trial of the disk and the processor; without up- and downloads."""
        return seconds(
            self.workplace,
            read=sum(spec.nbytes for spec in self.checkpoint.tensors),
            written=self.bytes_to_write,
            verify=self.verify,
        )


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    destination: Path
    tensors: int
    changed: dict[str, Changes]
    """Tensors with values that the cast changed."""
    verified: bool
    logits: Comparison | None


def plan(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    tokenizer: bool = True,
    verify: bool = True,
    logits: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    name_map: str | os.PathLike[str] | None = None,
    rope: str | None = None,
    scan_layers: bool = True,
    surgery: Surgery | None = None,
    shards: int | None = None,
    rename: str | os.PathLike[str] | None = None,
) -> Plan:
    """Check a conversion as far as that can be done before it begins. For the arguments see `convert`.

    Raises:
        ValueError: a source that is damaged or not a Llama, or that the target cannot hold; a destination
            that exists, is inside the source or has no parent directory; an unknown format or dtype; too
            little disk, or for `logits` memory.
    """
    target = destination_path(destination)
    to = to or ("gguf" if target.suffix == ".gguf" else "hf")
    if to not in writable():
        raise ValueError(f"to: found {to!r}, expected one of {', '.join(writable())}")
    target_format = FORMATS[to]
    dtype = None if dtype is None else dtype_name(str(dtype))
    if dtype is not None and dtype not in target_format.choices:
        raise ValueError(
            f"dtype: found {dtype!r}, expected one of {', '.join(target_format.choices)} "
            f"for {target_format.title}"
        )
    if max_shard_size is not None and to != "hf":
        raise ValueError(f"max_shard_size is for Hugging Face only, not for {target_format.title}")
    if shards is not None and (to != "hf" or max_shard_size is not None):
        raise ValueError("shards: is for Hugging Face only, and in place of max_shard_size")
    if max_shard_size is not None and max_shard_size <= 0:
        raise ValueError(
            f"max_shard_size: found {max_shard_size}, expected a positive number of bytes"
        )
    if not scan_layers and to != "maxtext":
        raise ValueError(f"scan_layers is for MaxText only, not for {target_format.title}")
    path = source_path(source)
    if not path.exists():
        raise ValueError(f"{source}: not found")
    if is_remote(target):
        require_absent(target)
    else:
        _require_writable(target, destination)
    if path.is_dir() and _is_inside(target, path):
        raise ValueError(f"{destination}: is inside the source {source}; choose a path outside it")
    checkpoint = _read(path, name_map, rope, rename, tokenizer=tokenizer)
    if logits:
        require_torch_and_memory(checkpoint)
    chosen = dtype or checkpoint.dtype
    if dtype is None and chosen not in target_format.dtypes:
        chosen = None
    rounding = None
    if adapter is not None:
        if logits:
            raise ValueError("logits: cannot be compared with PyTorch's while an adapter is merged")
        directory = source_path(adapter)
        checkpoint, rounding = with_adapter(checkpoint, directory, chosen, tokenizer=tokenizer)
    if surgery:
        if logits:
            raise ValueError("logits: cannot be compared with PyTorch's after the model is changed")
        checkpoint = operate(path, checkpoint, surgery, dtype)
        chosen = None if surgery.cast_only is not None else chosen
    specs = tuple(target_format.module.target_specs(checkpoint, chosen))
    if shards is not None:
        max_shard_size = shard_size_for(specs, shards)
    result = Plan(
        source=path,
        checkpoint=checkpoint,
        destination=target,
        to=to,
        dtype=chosen,
        specs=specs,
        max_shard_size=max_shard_size or DEFAULT_SHARD,
        verify=verify,
        logits=logits,
        scan_layers=scan_layers,
        rounding=rounding,
    )
    if result.spare_disk < 0:
        free = shutil.disk_usage(result.workplace).free
        needed = free - result.spare_disk
        raise ValueError(f"{result.workplace}: {free} bytes free, expected at least {needed}")
    return result


def _require_writable(target: Path, destination: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a local target is absent, and its directory can be written."""
    if os.path.lexists(target):
        raise ValueError(f"{destination}: exists already; choose another name or remove it")
    if not target.parent.is_dir():
        problem = (
            "not a directory" if target.parent.exists() else "no such directory; create it first"
        )
        raise ValueError(f"{target.parent}: {problem}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{target.parent}: no permission to write there")


def _is_inside(target: Path, directory: Path) -> bool:
    if is_remote(target) or is_remote(directory):
        return str(target).startswith(f"{directory}/")
    return target.resolve().is_relative_to(directory.resolve())


def run(plan: Plan, progress: Callable[[int], None] | None = None) -> Report:
    """Do what `plan` says.

    Args:
        progress: is called with the number of bytes just written, then just compared; where the
            destination is remote, then also just uploaded and compared there.

    Raises:
        ValueError: values that are not finite or do not fit the dtype, damage in the source, or an output
            that is not read back as it was written.
        OSError: the disk is full or broken.
    """
    target_format = FORMATS[plan.to].module
    progress = progress or (lambda count: None)
    cast_rule = target_format.cast_rule(plan.checkpoint, plan.dtype)
    all_options: dict[str, dict[str, Any]] = {
        "hf": {"max_shard_size": plan.max_shard_size},
        "maxtext": {"scan_layers": plan.scan_layers},
    }
    options = all_options.get(plan.to, {})
    source = replace(plan.checkpoint, dtype=plan.dtype)
    with ExitStack() as stack:
        upload = None
        if is_remote(plan.destination):
            upload = stack.enter_context(uploading(plan.destination))
        name = plan.destination.name
        staging = stack.enter_context(staging_in(plan.workplace, name))
        output = staging / name
        forget = forgetting(lambda: filter(Path.is_file, staging.rglob("*")), plan.bytes_to_write)

        def passed(nbytes: int) -> None:
            progress(nbytes)
            forget(nbytes)

        stack.enter_context(scratch_in(staging, plan.spare_disk))
        recording = record.recording(plan.source, source, plan.specs, cast_rule)
        with kept_heap(), reused_buffers(3 * plan.largest):
            with recording as (checkpoint, futures):
                target_format.write(checkpoint, output, passed, **options)
                records = {name: future.result() for name, future in futures.items()}
            if plan.verify:
                with reading_directly(not fits_page_cache(plan.bytes_to_write)):
                    read_back(target_format.read, output, checkpoint.config, records, passed)
        comparison = None
        if plan.logits:
            written = target_format.read(output, tokenizer=False)
            comparison = compare_logits(plan.source, plan.checkpoint, written, cast_rule)
        facts = {
            "source": plan.checkpoint.format,
            "target": FORMATS[plan.to].title,
            "dtype": plan.dtype,
            "parameters": plan.checkpoint.parameters,
            "verified": plan.verify,
            "logits": None if comparison is None else comparison._asdict(),
        }
        record.write(record.record_path(output), facts, records)
        if upload is not None:
            if output.is_file():
                content = record.record_path(output).read_bytes()
                write_bytes(record.record_path(plan.destination), content)
            upload(output, progress, verify=plan.verify)
        else:
            to_disk(staging)  # most of it is there: it was written while tensors were compared
            if output.is_file():
                os.replace(record.record_path(output), record.record_path(plan.destination))
            move(output, plan.destination)
    changed = {
        name: written.changes for name, written in records.items() if written.changes is not None
    }
    return Report(plan.destination, len(records), changed, plan.verify, comparison)


@kept_heap()  # before the source is opened, for which threads begin
def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    tokenizer: bool = True,
    verify: bool = True,
    logits: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    name_map: str | os.PathLike[str] | None = None,
    rope: str | None = None,
    scan_layers: bool = True,
    surgery: Surgery | None = None,
    shards: int | None = None,
    rename: str | os.PathLike[str] | None = None,
) -> Path:
    """Convert the Llama at `source`, of any known format, into `destination` and return its path.

    Args:
        source: a directory or file; its format is detected.
        destination: the directory, or for GGUF the file, to create; whatever happens, it is either absent
            or complete.
        to: hf, orbax, maxtext, gguf, meta, dcp or litgpt; by default gguf where `destination` ends in
            .gguf, else hf.
        dtype: float32, bfloat16, float16, float64, q8_0 for GGUF, or fp8 for hf (compressed-tensors); the
            names that formats use (F32, BF16) are accepted as well. By default what loses nothing.
        max_shard_size: largest size of a safetensors file, in bytes.
        tokenizer: whether to convert it too; if not, errors in it do not matter.
        verify: read the output back and compare every tensor before it is renamed into place.
        logits: compare logits with PyTorch's as well, which needs torch and memory for three models.
        adapter: a PEFT directory with a LoRA adapter to merge, in float32.
        name_map: TOML file with a map of names, for an Orbax checkpoint of another program.
        rope: "halves" or "pairs", the order of the rows of queries and keys in an Orbax checkpoint of
            MaxText's or another program's that does not tell it.
        scan_layers: whether MaxText's layers are stacked, as its setting of that name.
        surgery: other changes of the model: averaging, fewer layers, another vocabulary.
        rename: a JSON file of regular expressions and replacements for the names in the source.
        shards: how many safetensors files to write, in place of `max_shard_size`.

    Raises:
        ValueError: a mistake that you can correct, in one line; see `plan` and `run`.
        OSError: the disk is full or broken.

    Example:
        convert("model.gguf", "model/", dtype="bfloat16")
    """
    todo = plan(
        source,
        destination,
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        verify=verify,
        logits=logits,
        adapter=adapter,
        name_map=name_map,
        rope=rope,
        scan_layers=scan_layers,
        surgery=surgery,
        shards=shards,
        rename=rename,
    )
    return run(todo).destination


def _read(
    path: Path,
    name_map: str | os.PathLike[str] | None,
    rope: str | None,
    rename: str | os.PathLike[str] | None = None,
    *,
    tokenizer: bool = True,
) -> Checkpoint:
    if rope not in (None, "halves", "pairs"):
        raise ValueError(f"rope: found {rope!r}, expected halves or pairs")
    file = None if name_map is None else remote_path(name_map) or local_path(name_map)
    names = None if rename is None else read_rename(remote_path(rename) or local_path(rename))
    return registry.read(path, tokenizer=tokenizer, name_map=file, rope=rope, rename=names)


def info(
    source: str | os.PathLike[str],
    *,
    name_map: str | os.PathLike[str] | None = None,
    rope: str | None = None,
) -> dict[str, Any]:
    """What is in a checkpoint: format, parameters, config, dtypes, sizes, tokenizer, notes, problems.

    Only headers are read. A problem with the tokenizer, or with weights beside a config.json that can be
    read, is listed under "problems" instead of raised.

    Raises:
        ValueError: nothing there is a checkpoint.
    """
    path = source_path(source)
    problems: list[str] = []
    try:
        checkpoint = _read(path, name_map, rope)
    except ValueError as error:
        problems.append(str(error))
        try:
            checkpoint = _read(path, name_map, rope, tokenizer=False)
        except ValueError as second:
            if str(second) != problems[0]:
                problems.append(str(second))
            return {
                "format": registry.recognize(path).title if name_map is None else "Orbax",
                "config": registry.config_of(path),
                "notes": [],
                "problems": problems,
            }
    try:
        tokenizer = tokenizer_facts(checkpoint.files)
    except ValueError as error:
        tokenizer = {}
        problems.append(str(error))
    return {
        "format": checkpoint.format,
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint.tensors),
        "default_dtype": checkpoint.dtype or "each tensor's own",
        **tokenizer,
        **checkpoint.facts,
        "config": checkpoint.config,
        "files": sorted(checkpoint.files),
        "digests": len(checkpoint.digests),
        "notes": list(checkpoint.notes),
        "problems": problems,
    }
