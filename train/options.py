"""The options of a run, as dataclasses. `train.flags` makes flags of them, and help of their docstrings."""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llama_jax.attention.implementation import Implementation
from llama_jax.files.paths import source_path
from llama_jax.files.remote import remote_path
from llama_jax.numerics.remat_policy import Kept, KeptName, OffloadedName, Remat

FILE = "run.toml"

STDLIB = "stdlib"

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
StateDtype = Literal["float32", "bfloat16"]
ReduceDtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon", "lion", "adafactor", "sgd"]
Parametrization = Literal["standard", "mup"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
GuardAction = Literal["skip", "clip", "clip-layers"]
FsdpGather = Literal["layer", "step"]
SequenceOrder = Literal["zigzag", "contiguous"]
IdDtype = Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64"]
Boundary = Literal["eos", "bos"]


@dataclass(frozen=True)
class ModelOptions:
    """The model and how it is computed."""

    preset: str = "tiny-4m"
    """architecture by name; `python -m llama_jax info` lists the presets"""
    config: Path | None = None
    """Hugging Face config.json, a directory that has one or a name on the Hub, instead of a preset"""
    init_from: Path | None = None
    """Hugging Face directory, or name on the Hub, whose configuration and weights to start from"""
    width: int | None = None
    """hidden size instead of the preset's or config's; heads and MLP are in proportion"""
    parametrization: Parametrization = "standard"
    """mup scales initial values and learning rates with the width, so that the best learning rate of a
    narrow model fits a wide one"""
    mup_base_hidden_size: int | None = None
    """with mup, the hidden size of the narrow model: at this width the parametrizations are the same"""
    mup_base_intermediate_size: int | None = None
    """with mup, the intermediate size of the narrow model; default: in proportion"""
    mup_base_heads: int | None = None
    """with mup, the attention heads of the narrow model; default: in proportion"""
    mup_base_kv_heads: int | None = None
    """with mup, the key/value heads of the narrow model; default: in proportion"""
    mup_base_head_dim: int | None = None
    """with mup, the size of the narrow model's heads; default: that of the model's"""
    mup_zero_head: bool = False
    """with mup, begin with a head of zeros: the first logits are 0 in every width, not random and smaller
    the wider the model is; not for tied embeddings"""
    parameter_dtype: Dtype = "float32"
    """dtype of parameters, gradients and optimizer state; not float16, small gradients would become 0"""
    compute_dtype: Dtype | None = None
    """dtype of the forward and backward pass; default: float32 on a CPU, bfloat16 elsewhere; not float16"""
    reduce_dtype: ReduceDtype = "float32"
    """dtype in which devices add up the gradients of weights; with compute-dtype bfloat16 also bfloat16"""
    remat: Remat = "dots"
    """what to recompute in the backward pass: none, all but the outputs of matmuls (dots), or all (full)"""
    remat_save: tuple[KeptName, ...] = ()
    """with remat full, what to keep nevertheless: query, key, value, attention, output, gate, up, down"""
    remat_offload: tuple[OffloadedName, ...] = ()
    """the same, but kept in the host's memory; also input, a layer's input, else kept on the device"""
    scan_unroll: int | None = None
    """layers per iteration of the scan over layers; more compile longer and may run faster; default: all on
    a single GPU, else 1"""
    attention: Implementation | None = None
    """attention implementation; default: the fastest on the platform"""

    @property
    def remat_policy(self) -> Remat | Kept:
        """What the layers keep for the backward pass."""
        if self.remat_save or self.remat_offload:
            return Kept(self.remat_save, self.remat_offload)
        return self.remat


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer, the learning-rate schedule and regularization."""

    name: Optimizer = "adamw"
    """optimizer"""
    learning_rate: float = 3e-3
    """peak learning rate"""
    schedule: Schedule = "cosine"
    """learning-rate schedule after the warmup"""
    warmup_steps: int | None = None
    """steps of linear warmup; default: 20, or a tenth of the steps if that is less"""
    final_fraction: float = 0.1
    """final learning rate as a fraction of the peak (cosine, linear, wsd)"""
    decay_fraction: float = 0.2
    """fraction of all steps in which wsd decays"""
    beta1: float = 0.9
    """decay of the mean gradient (adamw, lion); momentum (muon, sgd)"""
    beta2: float = 0.95
    """decay of the mean squared gradient (adamw; muon where it uses adamw) or of the momentum (lion)"""
    eps: float = 1e-8
    """added to the denominators of adamw and muon"""
    weight_decay: float = 0.1
    """decoupled weight decay, applied to matrices only"""
    clip_norm: float | None = 1.0
    """clip the gradient to this global norm; None: no clipping"""
    z_loss: float = 0.0
    """weight of the z-loss, logsumexp^2 of the logits"""
    state_dtype: StateDtype | None = None
    """dtype of the optimizer's moments, if bfloat16 rounded stochastically; default: the parameters'"""
    offload: bool = False
    """keep the optimizer state in the host's memory, and bring it to the devices for the update"""


@dataclass(frozen=True)
class GuardOptions:
    """What becomes of a step that is an outlier among the last ones, or not finite."""

    action: GuardAction | None = None
    """outliers are left out (skip), or the gradient, as a whole (clip) or layer by layer (clip-layers), is
    scaled down to the bound, mean + sigma x standard deviation of the window; default: neither"""
    window: int = 128
    """steps of which mean and standard deviation are taken; the first ones are never outliers"""
    loss_sigma: float | None = 6.0
    """with skip, standard deviations that the loss may be above its mean; None: any number"""
    norm_sigma: float | None = 6.0
    """standard deviations that the gradient's norm may be above its mean; None: any number"""
    update_sigma: float | None = None
    """with skip, the same for the norm of the update; default: any number"""
    non_finite: int = 0
    """steps in a row without a finite loss and gradient that are left out; one more stops the run"""


@dataclass(frozen=True)
class AverageOptions:
    """The average of the parameters over the steps."""

    decay: float | None = None
    """keep an exponential moving average with this decay, such as 0.999, for `eval` and `export --average`;
    default: none"""


@dataclass(frozen=True)
class MeshOptions:
    """The device mesh. The sizes multiply to the number of devices; -1 stands for the remaining ones."""

    data: int = -1
    """data parallelism: replicas of the model, each with a part of the batch"""
    fsdp: int = 1
    """fully sharded data parallelism: shards of the weights, each with a part of the batch"""
    fsdp_gather: FsdpGather = "layer"
    """when fsdp gathers weights and reduces gradients: layer by layer in each micro-batch (ZeRO-3), or once
    a step (ZeRO-1), which sends less and holds all of both, in the computation's dtype and in float32"""
    sequence: int = 1
    """sequence parallelism: shards of each row"""
    sequence_order: SequenceOrder = "zigzag"
    """how a row is split: a shard's tokens are early and late ones, for equal work, or contiguous"""
    tensor: int = 1
    """tensor parallelism: shards of heads, MLP and vocabulary"""
    stage: int = 1
    """pipeline parallelism: stages with a part of the layers each, through which parts of the batch pass"""
    stage_micro_batches: int | None = None
    """parts of each micro-batch that pass through the stages; default: as many as it divides into, up to 4
    for each stage"""
    stage_repeats: int = 1
    """blocks of layers for each stage, in turn (interleaved schedule): stages idle less and send more"""


@dataclass(frozen=True)
class DistributedOptions:
    """Several processes; on clusters that JAX detects (TPU pods, SLURM, ...) `enabled` is enough."""

    enabled: bool = False
    """join the other processes of the cluster"""
    coordinator: str | None = None
    """HOST:PORT of process 0"""
    processes: int | None = None
    """number of processes"""
    process_id: int | None = None
    """index of this process, from 0"""


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints to resume from."""

    every: int = 100
    """steps between checkpoints"""
    keep_last: int = 2
    """how many of the newest checkpoints to keep"""
    keep_every: int | None = None
    """also keep the checkpoints at multiples of this many steps"""
    emergency_dir: Path | None = None
    """directory on another disk, in which to save if the run's is full"""


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluations during the run."""

    every: int = 100
    """steps between evaluations; 0: none"""
    batches: int = 16
    """batches of the validation split per evaluation; 0: all of them"""
    sample_prompt: str = "def "
    """prompt of the sample shown at each evaluation"""
    sample_tokens: int = 48
    """tokens of the sample; 0: no sample"""
    sample_temperature: float = 0.0
    """temperature of the sample, always drawn with the same random numbers; 0: greedy decoding"""


@dataclass(frozen=True)
class LogOptions:
    """Where metrics go besides metrics.jsonl and the terminal."""

    tensorboard: bool = False
    """write TensorBoard files to the run's folder"""
    wandb: str | None = None
    """Weights & Biases project to log to"""
    peak_flops: float | None = None
    """peak FLOPs/s of one device, for the MFU; default: from its data sheet, on a CPU a timed matmul"""
    statistics_every: int = 0
    """steps between statistics by layer of gradients, updates, parameters and activations; 0: none"""


@dataclass(frozen=True)
class TokenOptions:
    """Token files of other programs, which are read where they are."""

    tokenizer: Path | None = None
    """tokenizer of the files: a directory or a name on the Hub; default: that of --model.init-from"""
    dtype: IdDtype | None = None
    """dtype of the ids in files that do not name it; default: uint16, or uint32 for a larger vocabulary"""
    column: str = "input_ids"
    """column of Arrow files, or feature of the tf.train.Examples in ArrayRecord files, that has the ids"""
    boundary: Boundary | None = None
    """what separates documents in files without an index of them: the id that ends each (eos) or the one
    that begins each (bos); default: eos, and bos in files of llm.c"""
    validation_fraction: float = 0.0
    """fraction of the tokens to hold out for validation: the last documents of each source that has no
    files for it"""


@dataclass(frozen=True)
class EvalOptions:
    """What `eval` is told about its data."""

    tokens: TokenOptions = field(default_factory=TokenOptions)


@dataclass(frozen=True)
class RunOptions:
    """A pretraining run."""

    out: Path = Path("runs/run")
    """folder of the run, or its URL in an object store"""
    data: tuple[str, ...] = (STDLIB,)
    """token directories or token files of other programs, PATH or PATH=WEIGHT; `stdlib` is the source code
    of Python's standard library"""
    steps: int = 300
    """optimizer steps"""
    batch_size: int = 8
    """rows per step, over all devices"""
    sequence_length: int = 256
    """tokens per row"""
    micro_batches: int = 1
    """split the batch into this many parts, run one after the other; gradients are summed"""
    seed: int = 0
    """seed of the initial weights, the order of the data and dropout"""
    init_from: Path | None = None
    """continue the run whose weights and optimizer state are in this directory: one of `export
    --with-optimizer` or `resume_torch.py`, with its options, or of other programs with an optimizer.pt"""
    export_every: int = 0
    """steps between exports to Hugging Face directories in the run's folder; 0: none"""
    deterministic: bool = False
    """on a GPU, repeat a run bit for bit, with slower kernels; on a CPU or TPU runs repeat anyway"""
    tokens: TokenOptions = field(default_factory=TokenOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    guard: GuardOptions = field(default_factory=GuardOptions)
    average: AverageOptions = field(default_factory=AverageOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    log: LogOptions = field(default_factory=LogOptions)


# The defaults of `plan`: a model for a pod, with 4 Mi tokens a step.
PLANNED = RunOptions(
    batch_size=512,
    sequence_length=8192,
    model=ModelOptions(preset="llama-3.1-8b", remat="full"),
    mesh=MeshOptions(data=1, fsdp=-1),
)

# The defaults of `sweep`: nothing that only a single run needs.
SWEPT = RunOptions(
    out=Path("runs/sweep"),
    checkpoint=CheckpointOptions(keep_last=1),
    evaluation=EvaluationOptions(sample_tokens=0),
)

# The defaults of `coordinates`, whose base is the narrowest width. It does not clip: the norm of all
# gradients together grows with the width, so that a bound would be met in some widths and not in others.
COORDINATES = RunOptions(
    out=Path("runs/coordinates"),
    steps=10,
    sequence_length=64,
    model=ModelOptions(parametrization="mup"),
    evaluation=EvaluationOptions(every=0),
    optimizer=OptimizerOptions(schedule="constant", warmup_steps=0, clip_norm=None),
)


def warmup_steps(optimizer: OptimizerOptions, steps: int) -> int:
    """The steps of the warmup, with the default filled in."""
    return min(20, steps // 10) if optimizer.warmup_steps is None else optimizer.warmup_steps


def with_defaults(options: RunOptions, platform: str) -> RunOptions:
    """Fill in the defaults that depend on the platform or on other options, for run.toml.

    So a run that is extended keeps the warmup that it began with.
    """
    compute_dtype: Dtype = "float32" if platform == "cpu" else "bfloat16"
    model, optimizer = options.model, options.optimizer
    return replace(
        options,
        model=replace(model, compute_dtype=model.compute_dtype or compute_dtype),
        optimizer=replace(optimizer, warmup_steps=warmup_steps(optimizer, options.steps)),
    )


def with_absolute_paths(options: RunOptions) -> RunOptions:
    """Make paths absolute, so that the run can be resumed from another working directory.

    A model's name on the Hub becomes the directory of the cache that its files are in.
    """
    model = options.model
    for option, path in (("model.config", model.config), ("model.init-from", model.init_from)):
        if path is not None:
            require_local(option, path)
    if model.config is not None:
        config = source_path(model.config, weights=False).absolute()
        model = dataclasses.replace(model, config=config)
    if model.init_from is not None:
        model = dataclasses.replace(model, init_from=source_path(model.init_from).absolute())
    checkpoint = options.checkpoint
    if checkpoint.emergency_dir is not None:
        require_local("checkpoint.emergency-dir", checkpoint.emergency_dir)
        directory = checkpoint.emergency_dir.absolute()
        checkpoint = dataclasses.replace(checkpoint, emergency_dir=directory)
    tokens = options.tokens
    if tokens.tokenizer is not None:
        require_local("tokens.tokenizer", tokens.tokenizer)
        directory = source_path(tokens.tokenizer, weights=False).absolute()
        tokens = dataclasses.replace(tokens, tokenizer=directory)
    init_from = None if options.init_from is None else options.init_from.absolute()
    data = tuple(
        text if split_weight(text)[0] == STDLIB else str(Path(text).absolute())
        for text in options.data
    )
    return dataclasses.replace(
        options,
        data=data,
        tokens=tokens,
        model=model,
        init_from=init_from,
        checkpoint=checkpoint,
    )


def require_local(option: str, path: str | Path) -> None:
    """Raise ValueError for the path of an option that is remote."""
    if (remote := remote_path(path)) is not None:
        raise ValueError(f"{option}: {remote} is remote; copy it to this machine first")


def split_weight(text: str) -> tuple[str, float]:
    """The directory and the weight of one `--data` argument.

    A path that exists is a directory, whatever its name; otherwise what follows the last `=` is a weight.

    Raises:
        ValueError: no directory, or a weight that is not a positive number.
    """
    path, sign, number = text.rpartition("=")
    if not (path if sign else text):
        raise ValueError("data: is empty; give token directories, PATH or PATH=WEIGHT")
    require_local("data", text)
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
