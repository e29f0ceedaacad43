"""What a run is: dataclasses that tyro turns into flags, and TOML that turns into the same flags."""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llama_jax.attention.dispatch import Implementation
from llama_jax.numerics.remat import Remat

FILE = "run.toml"

STDLIB = "stdlib"

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Optimizer = Literal["adamw", "muon", "lion", "adafactor", "sgd"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]


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


def warmup_steps(optimizer: OptimizerOptions, steps: int) -> int:
    """The steps of the warmup, its default filled in."""
    return min(20, steps // 10) if optimizer.warmup_steps is None else optimizer.warmup_steps


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
