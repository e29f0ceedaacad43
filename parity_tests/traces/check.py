"""Check a trace: is it the function that the checkpoint and its config mean, and where does it depart?"""

import importlib.util
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llama_jax import LlamaConfig
from llama_jax.formatting import summarize
from parity_tests.report.programs.checkpoint import HEAD, Checkpoint, open_checkpoint, read
from parity_tests.traces.names import COS, SIN, Place, place
from parity_tests.traces.optimizer_step import step_residuals
from parity_tests.traces.our_sections import OurSections
from parity_tests.traces.precision import DTYPES, describe, precision_of
from parity_tests.traces.residuals import Residual
from parity_tests.traces.sections import Inputs
from parity_tests.traces.trace import MANIFEST, Trace, digest, open_trace
from parity_tests.traces.walk import Walk

if TYPE_CHECKING:  # needs torch
    from parity_tests.traces.cause import Cause


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        title: the trace.
        program: what was recorded, on which device.
        precision: what it rounds to.
        reference: what it was compared with.
        shape: batch and length of the tokens.
        findings: differences of weights and config, as sentences.
        values, gradients: residuals in forward and in backward order.
        steps: residuals of the parameters' updates.
        causes: of the departures; None where torch is not installed.
        notes: what the program does otherwise that Llama's definition leaves open, as sentences.
        seconds, peak: time, and bytes of the whole process.
    """

    title: str
    program: str
    precision: str
    reference: str
    shape: tuple[int, int]
    findings: list[str]
    values: list[Residual]
    gradients: list[Residual]
    steps: list[Residual]
    causes: "list[Cause] | None"
    notes: list[str]
    seconds: float
    peak: int

    @property
    def departures(self) -> list[Residual]:
        """Arrays whose error rounding does not explain, forward ones first."""
        return [r for r in (*self.values, *self.gradients, *self.steps) if r.departs]

    @property
    def holds(self) -> bool:
        """Whether the recorded program computes the checkpoint's function."""
        return not self.departures and not self.findings


def check(
    folder: Path,
    directory: Path,
    *,
    start: Callable[[int], Callable[[], None]] = lambda steps: lambda: None,
    compiled: dict[Any, Any] | None = None,
) -> Verdict:
    """Compare every array of a trace with what a checkpoint should compute.

    The reference is the float64 oracle or, where torch is not installed, llama_jax in float64. Errors may
    be `LIMIT` times those of llama_jax in the precision of the recording.

    Args:
        folder: the trace.
        directory: the Hugging Face checkpoint.
        start: called with the number of sections; what it returns is called after each.
        compiled: what several checks of one model share.

    Raises:
        ValueError: in one line: no trace, or one of another model.
    """
    begin = time.perf_counter()
    trace, checkpoint = open_trace(folder), open_checkpoint(directory)
    walk, findings = prepare(trace, checkpoint, compiled)
    precision = precision_of(trace)
    steps = list(step_residuals(trace, checkpoint, precision.parameters))
    kinds = {p.kind for p in map(place, trace.stored) if p is not None}
    with_gradients = bool({"gradient", "weight gradient"} & kinds)
    advance = start(len(walk.sections) * (2 if with_gradients else 1))
    values = list(walk.forward(advance=advance))
    gradients = list(walk.backward(advance=advance)) if with_gradients else []
    manifest = trace.manifest
    causes: list[Cause] | None = None
    notes: list[str] = []
    if importlib.util.find_spec("torch") is not None:
        from parity_tests.traces.cause import find_causes, find_step_cause

        residuals = [*values, *gradients]
        causes, agreed = find_causes(walk, checkpoint, precision.parameters, residuals)
        gradients = [agreed[r.direction, r.name] for r in gradients]
        of_step = find_step_cause(trace, checkpoint, precision.parameters, steps)
        causes += [] if of_step is None else [of_step]
        notes = [cause.words for cause in causes if cause.convention]
        causes = [cause for cause in causes if not cause.convention]
    return Verdict(
        title=str(folder),
        program=f"{manifest.get('program', 'unknown')} on {manifest.get('device', 'unknown')}",
        precision=describe(precision),
        reference=walk.programs[0].name,
        shape=walk.inputs.ids.shape,
        findings=findings,
        values=values,
        gradients=gradients,
        steps=steps,
        causes=causes,
        notes=notes,
        seconds=time.perf_counter() - begin,
        peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def prepare(
    trace: Trace, checkpoint: Checkpoint, compiled: dict[Any, Any] | None = None
) -> tuple[Walk, list[str]]:
    """The walk of a trace over a checkpoint, and what its weights and config differ in.

    Raises:
        ValueError: a trace of another model.
    """
    config = checkpoint.config
    precision = precision_of(trace)
    findings = _require_same_model(trace, checkpoint)
    inputs = _inputs(trace, config)
    _require_shapes(trace, checkpoint, inputs.ids.shape)
    wide = precision._replace(compute=DTYPES["float64"], operands="float32", results="float32")
    exact: Any
    if importlib.util.find_spec("torch") is None:
        exact = OurSections(checkpoint, wide, inputs, compiled)
    else:
        from parity_tests.traces.oracle_sections import OracleSections

        exact = OracleSections(checkpoint, precision.parameters, inputs)
    rounded = OurSections(checkpoint, precision, inputs, compiled)
    return Walk(trace, config, inputs, exact, rounded), findings


def _inputs(trace: Trace, config: LlamaConfig) -> Inputs:
    arrays = trace.inputs()
    ids = arrays["input_ids"]
    if ids.ndim != 2 or ids.shape[1] < 1:
        raise ValueError(
            f"{trace.folder}: input_ids: found shape {list(ids.shape)}, expected [batch, length]"
        )
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise ValueError(
            f"{trace.folder}: input_ids: found token {outside[0]}, expected 0 to {config.vocab_size - 1}: "
            "ids of another tokenizer"
        )
    for name, array in arrays.items():
        if name == "position_ids" and array.shape == (1, ids.shape[1]):
            continue  # one for all rows
        if array.shape != ids.shape:
            raise ValueError(
                f"{trace.folder}: {name}: found shape {list(array.shape)}, expected {list(ids.shape)}"
            )
    labels = arrays.get("labels")
    if labels is not None:
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= config.vocab_size))]
        if wrong.size:
            raise ValueError(
                f"{trace.folder}: labels: found {wrong[0]}, expected -100 or 0 to {config.vocab_size - 1}"
            )
    del arrays["input_ids"]
    items = trace.manifest.get("num_items_in_batch")
    if items is not None and not (isinstance(items, int | float) and items > 0):
        where = f"{trace.folder / MANIFEST}: num_items_in_batch"
        raise ValueError(f"{where}: found {items!r}, expected a number above 0")
    return Inputs(ids, **arrays, num_items=items)


def _require_same_model(trace: Trace, checkpoint: Checkpoint) -> list[str]:
    """Raises ValueError for a trace of another model; returns what differs otherwise."""
    where, config = (
        f"{trace.folder}: of another model than {checkpoint.directory}",
        checkpoint.config,
    )
    sizes = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
    }
    shape, fields = trace.manifest.get("shape") or {}, trace.manifest.get("config") or {}
    for name, size in sizes.items():
        recorded = shape.get(name) or fields.get(name)
        if recorded is not None and recorded != size:
            raise ValueError(f"{where}: {name}: found {recorded}, expected {size}")
    weights: Mapping[str, str] = trace.manifest["weights"]
    dtypes = [
        DTYPES[name]
        for name in str(trace.manifest["precision"].get("parameters")).split()
        if name in DTYPES
    ]
    different = [
        name for name, recorded in weights.items() if not _same(checkpoint, name, recorded, dtypes)
    ]
    if len(different) == len(weights):
        halves = [DTYPES["bfloat16"], DTYPES["float16"]]
        if not any(_same(checkpoint, name, recorded, halves) for name, recorded in weights.items()):
            raise ValueError(
                f"{where}: none of its {len(weights)} weights is the checkpoint's, by SHA-256"
            )
    findings = [f"config: {text}" for text in _config_differences(fields, config)]
    if dropout := trace.manifest.get("dropout"):
        findings.append(f"recorded with dropout of {dropout}: call model.eval() first")
    if different:
        findings.append(summarize("weights that are not the checkpoint's", different, limit=3))
    return findings


def _same(checkpoint: Checkpoint, name: str, recorded: str, dtypes: list[np.dtype]) -> bool:
    if name not in checkpoint.stored:
        return False
    return any(digest(read(checkpoint, name, dtype)) == recorded for dtype in dtypes)


def _config_differences(fields: Mapping[str, Any], config: LlamaConfig) -> Iterator[str]:
    """Fields that change the function."""
    if fields.get("model_type") != "llama":
        return
    try:
        recorded = LlamaConfig.from_dict(fields)
    except ValueError as error:
        yield str(error)
        return
    names = (
        "rms_norm_eps",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "head_size",
        "pretraining_tp",
    )
    for name in (*names, "tie_word_embeddings"):
        found, expected = getattr(recorded, name), getattr(config, name)
        if found != expected:
            yield f"{name}: recorded with {found}, the checkpoint has {expected}"
    ours, theirs = (dict(sorted(c.rope.items())) for c in (config, recorded))
    if ours != theirs:
        yield f"rotary embedding: recorded with {theirs}, the checkpoint has {ours}"


def _require_shapes(trace: Trace, checkpoint: Checkpoint, tokens: tuple[int, int]) -> None:
    problems = []
    for array, stored in trace.stored.items():
        what = place(array)
        if what is None or what.kind == "input":
            continue
        expected = _shape(what, checkpoint, tokens)
        if expected is None:
            problems.append(f"{array}: the checkpoint has no such module")
        elif not any(_fits(stored.shape, shape) for shape in expected):
            problems.append(f"{array}: found {list(stored.shape)}, expected {expected[0]}")
    if problems:
        title = f"{trace.folder}: {len(problems)} arrays do not fit {checkpoint.directory}"
        raise ValueError(summarize(title, problems, limit=3))


def _fits(found: tuple[int, ...], expected: list[int]) -> bool:
    """Whether shapes are equal, where heads may be an axis of their own or not."""
    same = list(found[:2]) == expected[:2] and math.prod(found) == math.prod(expected)
    return list(found) == expected or (same and len(found) > 2 and len(expected) > 2)


def _shape(what: Place, checkpoint: Checkpoint, tokens: tuple[int, int]) -> list[list[int]] | None:
    """The shapes that an array may have; None if the checkpoint has nothing like it."""
    config, (batch, length) = checkpoint.config, tokens
    if what.kind in ("weight gradient", "optimizer"):
        if what.name == HEAD and HEAD not in checkpoint.stored:
            return [[config.vocab_size, config.hidden_size]]
        stored = checkpoint.stored.get(what.name)
        return None if stored is None else [list(stored.shape)]
    name, dim = what.name, config.head_size
    if name == "loss":
        return [[], [1]]
    if name in (COS, SIN):
        return [[rows, length, dim] for rows in (1, batch)]
    parts = name.split(".")
    if parts[0] == "layers" and int(parts[1]) >= config.num_hidden_layers:
        return None
    queries, keys = config.num_attention_heads, config.kv_heads
    widths = {
        "q_proj": queries * dim,
        "k_proj": keys * dim,
        "v_proj": keys * dim,
        "attention": queries * dim,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
        "act": config.intermediate_size,
        "lm_head": config.vocab_size,
    }
    if name.endswith((".rotate.q", ".rotate.k")):
        return [[batch, length, queries if name.endswith("q") else keys, dim]]
    return [[batch, length, widths.get(parts[-1], config.hidden_size)]]
