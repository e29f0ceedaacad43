"""What a run is: dataclasses that tyro turns into flags, and TOML that turns into the same flags."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tomli_w

from llama_jax.attention.dispatch import Implementation
from llama_jax.numerics.remat import Remat
from llama_jax.text.lines import read_text
from train.program.optimizer import DIRECTIONS, Optimizer
from train.program.schedules import USES, Schedule, require_fit

FILE = "run.toml"

STDLIB = "stdlib"

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class ModelOptions:
    """The model and how it computes."""

    preset: str = "tiny-4m"
    """name of a configuration; `python -m llama_jax info` lists them"""
    config: Path | None = None
    """a config.json of Hugging Face, or a directory that has one, instead of a preset"""
    init_from: Path | None = None
    """a Hugging Face directory to start from: its configuration and its weights"""
    parameter_dtype: Dtype = "float32"
    """of parameters, gradients and optimizer state; not float16, whose range is too small to train"""
    compute_dtype: Dtype | None = None
    """of the forward and backward pass; default: float32 on a CPU, bfloat16 elsewhere; not float16"""
    remat: Remat = "dots"
    """what the backward pass computes again instead of keeping it"""
    scan_unroll: int = 1
    """layers in one turn of the loop over them; more compile longer and can run faster"""
    attention: Implementation | None = None
    """attention's implementation; default: the fastest for the platform"""


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer, its schedule and the loss's regularisation."""

    name: Optimizer = "adamw"
    learning_rate: float = 3e-3
    """the peak"""
    schedule: Schedule = "cosine"
    warmup_steps: int | None = None
    """default: 20, or a tenth of a run of fewer than 200 steps"""
    final_fraction: float = 0.1
    """final learning rate as a fraction of the peak (cosine, linear, wsd)"""
    decay_fraction: float = 0.2
    """of all steps, for the decay of wsd"""
    beta1: float = 0.9
    """decay of the gradient's mean (adamw, lion), momentum (muon, sgd)"""
    beta2: float = 0.95
    """decay of the mean of the gradient's square (adamw, muon's share of adamw), of the momentum (lion)"""
    eps: float = 1e-8
    """added to what adamw and muon divide by"""
    weight_decay: float = 0.1
    """times the learning rate at every step; applied to matrices only, not to norms and biases"""
    clip_norm: float | None = 1.0
    """largest global norm of the gradient; None: no clip"""
    z_loss: float = 0.0
    """multiplier of logsumexp^2"""


@dataclass(frozen=True)
class MeshOptions:
    """How devices share the work: axes that multiply to their number, one of them -1 for the rest."""

    data: int = -1
    """copies of the model, each with its rows of the batch"""
    fsdp: int = 1
    """parts of the weights, each with its rows of the batch"""
    sequence: int = 1
    """parts of each row"""
    tensor: int = 1
    """parts of heads, MLP and vocabulary"""


@dataclass(frozen=True)
class DistributedOptions:
    """Several processes; clusters that JAX knows (TPU pods, SLURM, ...) need `enabled` only."""

    enabled: bool = False
    coordinator: str | None = None
    """host:port of process 0"""
    processes: int | None = None
    process_id: int | None = None


@dataclass(frozen=True)
class CheckpointOptions:
    """What is kept to go on from."""

    every: int = 100
    """steps between checkpoints"""
    keep_last: int = 2
    keep_every: int | None = None
    """checkpoints at multiples of so many steps are kept for good"""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured and shown on the way."""

    every: int = 100
    """steps between evaluations; 0: none"""
    batches: int = 16
    """of the validation split; 0: all of it"""
    sample_prompt: str = "def "
    sample_tokens: int = 48
    """greedy tokens shown at each evaluation; 0: none"""


@dataclass(frozen=True)
class LogOptions:
    """Where figures go besides metrics.jsonl and the terminal."""

    tensorboard: bool = False
    wandb: str | None = None
    """a Weights & Biases project"""
    peak_flops: float | None = None
    """of one device, for MFU; default: the chip's data sheet, on a CPU a measured product"""


@dataclass(frozen=True)
class RunOptions:
    """A pretraining run."""

    out: Path = Path("runs/run")
    """the run's folder"""
    data: tuple[str, ...] = (STDLIB,)
    """token directories, each PATH or PATH=WEIGHT; stdlib is the source of Python's standard library"""
    steps: int = 300
    batch_size: int = 8
    """rows of one step, over all devices"""
    sequence_length: int = 256
    micro_batches: int = 1
    """parts of a step's batch, one after the other; gradients are summed"""
    seed: int = 0
    export_every: int = 0
    """steps between exports as a Hugging Face directory in the run's folder; 0: none"""
    model: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    log: LogOptions = field(default_factory=LogOptions)


# What `plan` plans unless told otherwise: a model for a pod, with 4 Mi tokens a step.
PLANNED = RunOptions(
    batch_size=512,
    sequence_length=8192,
    model=ModelOptions(preset="llama-3.1-8b", remat="full"),
    mesh=MeshOptions(data=1, fsdp=-1),
)

# What a resumed run may have otherwise: where and how it computes, not what.
FREE_ON_RESUME = (
    "out",
    "mesh",
    "distributed",
    "checkpoint",
    "evaluation",
    "log",
    "export_every",
    "steps",  # as far as `train.run.extension` allows
    "model.remat",
    "model.scan_unroll",
    "model.attention",
)


def validate(options: RunOptions) -> None:
    """Raise ValueError for the first option that is wrong in itself, or does not fit the others."""
    for name in ("parameter_dtype", "compute_dtype"):
        if getattr(options.model, name) == "float16":
            raise ValueError(
                f"model.{_flag(name)}: found float16, expected bfloat16, float32 or float64: small "
                "gradients become 0 in float16"
            )
    require_counts(options)
    _require_numbers(options)
    _require_used(options.optimizer)
    optimizer = options.optimizer
    require_fit(
        optimizer.schedule,
        steps=options.steps,
        warmup_steps=warmup_steps(optimizer, options.steps),
        decay_fraction=optimizer.decay_fraction,
    )


def warmup_steps(optimizer: OptimizerOptions, steps: int) -> int:
    """The steps of the warmup, its default filled in."""
    return min(20, steps // 10) if optimizer.warmup_steps is None else optimizer.warmup_steps


def require_counts(options: RunOptions) -> None:
    """Raise ValueError for the first count that no run has."""
    distributed = options.distributed
    at_least = {
        "steps": (options.steps, 1),
        "batch-size": (options.batch_size, 1),
        "sequence-length": (options.sequence_length, 1),
        "micro-batches": (options.micro_batches, 1),
        "export-every": (options.export_every, 0),
        "model.scan-unroll": (options.model.scan_unroll, 1),
        "optimizer.warmup-steps": (options.optimizer.warmup_steps, 0),
        "distributed.processes": (distributed.processes, 1),
        "distributed.process-id": (distributed.process_id, 0),
        "checkpoint.every": (options.checkpoint.every, 1),
        "checkpoint.keep-last": (options.checkpoint.keep_last, 1),
        "checkpoint.keep-every": (options.checkpoint.keep_every, 1),
        "evaluation.every": (options.evaluation.every, 0),
        "evaluation.batches": (options.evaluation.batches, 0),
        "evaluation.sample-tokens": (options.evaluation.sample_tokens, 0),
    }
    for name, (value, low) in at_least.items():
        if value is not None and value < low:
            raise ValueError(f"{name}: found {value}, expected at least {low}")
    if options.batch_size % options.micro_batches:
        raise ValueError(
            f"micro-batches: found {options.micro_batches}, expected to divide the batch size "
            f"{options.batch_size}"
        )


def _require_numbers(options: RunOptions) -> None:
    optimizer = options.optimizer
    # a smaller eps or clip is 0 to the parameters' dtype: 0 / 0 where there is no gradient, or no step
    dtype = jnp.finfo(options.model.parameter_dtype)
    least, finite = float(dtype.smallest_normal), float(dtype.max)
    # the largest below 1, to powers of which Adam's means are divided
    most = float(np.nextafter(np.float32(1), np.float32(0)))
    beta = 0.0, most, "at least 0 and below 1"
    amount = 0.0, finite, "a finite number of at least 0"
    tiny = f"a finite number above 0 (at least {least:.2g})"
    # name: its value, the least, the most, and both in words
    numbers: dict[str, tuple[float | None, float, float, str]] = {
        "optimizer.learning-rate": (optimizer.learning_rate, *amount),
        "optimizer.final-fraction": (optimizer.final_fraction, 0, 1, "0 to 1"),
        "optimizer.decay-fraction": (optimizer.decay_fraction, least, 1, "above 0 and at most 1"),
        "optimizer.beta1": (optimizer.beta1, *beta),
        "optimizer.beta2": (optimizer.beta2, *beta),
        "optimizer.eps": (optimizer.eps, least, finite, tiny),
        "optimizer.weight-decay": (optimizer.weight_decay, *amount),
        "optimizer.clip-norm": (
            optimizer.clip_norm,
            least,
            finite,
            f"{tiny}, or None for no clip",
        ),
        "optimizer.z-loss": (optimizer.z_loss, *amount),
        "log.peak-flops": (options.log.peak_flops, least, finite, "a finite number above 0"),
    }
    for name, (value, smallest, largest, expected) in numbers.items():
        if value is not None and not smallest <= value <= largest:
            raise ValueError(f"{name}: found {value}, expected {expected}")


def _require_used(optimizer: OptimizerOptions) -> None:
    """An option that the optimizer or the schedule has not must be left as it is."""
    unused = {
        optimizer.name: {"beta1", "beta2", "eps"} - {*DIRECTIONS[optimizer.name].uses},
        optimizer.schedule: {"final_fraction", "decay_fraction"} - {*USES[optimizer.schedule]},
    }
    for user, names in unused.items():
        for name in sorted(names):
            value, default = getattr(optimizer, name), getattr(OptimizerOptions, name)
            if value != default:
                raise ValueError(
                    f"optimizer.{_flag(name)}: found {value}, but {user} does not use it: leave it out, or "
                    f"at {default}"
                )


def _flag(name: str) -> str:
    return name.replace("_", "-")


def with_defaults(options: RunOptions, platform: str) -> RunOptions:
    """The options with what depends on the platform or on other options filled in, for run.toml.

    A run that is extended keeps the warmup that it was begun with.
    """
    kind: Dtype = "float32" if platform == "cpu" else "bfloat16"
    model, optimizer = options.model, options.optimizer
    return replace(
        options,
        model=replace(model, compute_dtype=model.compute_dtype or kind),
        optimizer=replace(optimizer, warmup_steps=warmup_steps(optimizer, options.steps)),
    )


def with_absolute_paths(options: RunOptions) -> RunOptions:
    """The same, for a folder that is resumed from elsewhere."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    model = dataclasses.replace(
        options.model,
        config=absolute(options.model.config),
        init_from=absolute(options.model.init_from),
    )
    data = tuple(
        text if split_weight(text)[0] == STDLIB else str(Path(text).absolute())
        for text in options.data
    )
    return dataclasses.replace(options, data=data, model=model)


def split_weight(text: str) -> tuple[str, float]:
    """The directory and the weight of one `--data`.

    What exists is a directory, whatever its name; else a number after the last `=` is a weight.

    Raises:
        ValueError: a weight that is not a positive number.
    """
    path, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        raise ValueError(
            f"data: {text} does not exist, and {number!r} after the = is not a weight: expected PATH or "
            "PATH=WEIGHT"
        ) from None
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"data: found weight {number!r}, expected a positive number")
    return path, weight


def to_toml(options: Any) -> str:
    """The options as TOML, which has no None: it is left out where it is the default, else "None"."""

    def plain(value: Any, default: Any) -> Any:
        if dataclasses.is_dataclass(value):
            pairs = {
                item.name: (getattr(value, item.name), getattr(default, item.name))
                for item in dataclasses.fields(value)
            }
            return {name: plain(*pair) for name, pair in pairs.items() if pair != (None, None)}
        if isinstance(value, tuple):
            return [plain(inner, None) for inner in value]
        return str(value) if value is None or isinstance(value, Path) else value

    return tomli_w.dumps(plain(options, type(options)()))


def flags_of(path: Path) -> list[str]:
    """The flags that a TOML file stands for, so that one parser checks both.

    Raises:
        ValueError: no such file, not TOML, or a key that is none of `RunOptions`.
    """
    try:
        values = tomllib.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: is not TOML ({error})") from None
    flags: list[str] = []

    def add(prefix: str, table: Mapping[str, Any], known: Any) -> None:
        names = {item.name: item for item in dataclasses.fields(known)}
        for key, value in table.items():
            name = key.replace("-", "_")
            if name not in names:
                raise ValueError(f"{path}: found {prefix}{key}, expected one of {', '.join(names)}")
            inner = getattr(known, name)
            if dataclasses.is_dataclass(inner):
                if not isinstance(value, Mapping):
                    raise ValueError(f"{path}: found {prefix}{key} = {value!r}, expected a table")
                add(f"{prefix}{name}.", value, inner)
                continue
            flag = f"{prefix}{name}".replace("_", "-")
            if isinstance(value, bool):
                before, _, last = flag.rpartition(".")
                flags.append(f"--{flag}" if value else f"--{before + '.' * bool(before)}no-{last}")
            else:
                # the form with = keeps a value that begins with a dash from being read as a flag
                many = isinstance(value, list)
                flags.extend([f"--{flag}", *map(str, value)] if many else [f"--{flag}={value}"])

    add("", values, RunOptions())
    return flags


def differences(old: RunOptions, new: RunOptions) -> list[str]:
    """The fields that a resumed run must not change, and did: "name: found NEW, expected OLD"."""
    found: list[str] = []

    def compare(prefix: str, before: Any, after: Any) -> None:
        for item in dataclasses.fields(before):
            name = prefix + item.name
            if name in FREE_ON_RESUME:
                continue
            one, other = getattr(before, item.name), getattr(after, item.name)
            if dataclasses.is_dataclass(one):
                compare(name + ".", one, other)
            elif one != other:
                found.append(f"{name.replace('_', '-')}: found {other}, expected {one}")

    compare("", old, new)
    return found
