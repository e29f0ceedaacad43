"""The training state beside an exported model: the directory `training_state`, to train on from elsewhere.

    state.json            step, optimizer, schedule, position in the data, and the SHA-256 of every file
    run.toml              the run's options, but for those of its machine
    exp_avg, exp_avg_sq   AdamW's moments, each stored like the weights: a Hugging Face directory
    batches.bin           little-endian int64 [steps, rows, 2]: source and window of every row to come

`parity_tests/resume_torch.py` reads it and writes it.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import optax

from llama_jax.checkpoints.match import abstract_model, match_checkpoint
from llama_jax.checkpoints.names import name_table
from llama_jax.checkpoints.weight_files import open_weights
from llama_jax.config import LlamaConfig
from llama_jax.files.json_object import read_json_object
from llama_jax.formatting import summarize
from llama_jax.models.causal_lm import LlamaForCausalLM
from train.data.identity import SHOWN
from train.flags import parse_options
from train.options import FILE as OPTIONS
from train.options import DistributedOptions, LogOptions, MeshOptions, RunOptions
from train.options_toml import flags_of
from train.program.optimizer import decays

FOLDER = "training_state"
MANIFEST = "state.json"
BATCHES = "batches.bin"
FORMAT = "llama_jax training state 1"
# torch's names of AdamW's moments, and optax's
MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}


class TrainingState(NamedTuple):
    """directory: of the model. step: steps done. manifest: the contents of state.json."""

    directory: Path
    step: int
    manifest: dict[str, Any]

    def moment(self, name: str) -> Path:
        """The directory of one of `MOMENTS`."""
        return self.directory / FOLDER / name


def read_state(directory: Path) -> TrainingState:
    """The state beside the model in `directory`; no digests are compared yet.

    Raises:
        ValueError: there is none, of another format, or with a field missing.
    """
    path = directory / FOLDER / MANIFEST
    manifest = read_json_object(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format: found {manifest.get('format')!r}, expected {FORMAT!r}")
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 1:
        raise ValueError(f"{path}: step: found {step!r}, expected the number of steps done")
    optimizer, data = manifest.get("optimizer"), manifest.get("data")
    for name, value in (("files", files), ("optimizer", optimizer), ("data", data)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name}: found {value!r}, expected an object")
    return TrainingState(directory, step, manifest)


def saved_options(state: TrainingState) -> RunOptions:
    """The options of the run that the state is of. Raises ValueError for a run.toml that is damaged."""
    path = state.directory / FOLDER / OPTIONS
    return parse_options(RunOptions(), flags_of(path), path)


def without_machine(options: RunOptions) -> RunOptions:
    """The options that say what is computed, for run.toml: not where, nor what the run began from."""
    defaults = RunOptions()
    return replace(
        options,
        out=defaults.out,
        init_from=None,
        model=replace(
            options.model, init_from=None, config=None, width=None, preset=defaults.model.preset
        ),
        mesh=MeshOptions(),
        distributed=DistributedOptions(),
        log=LogOptions(),
    )


def require_no_extras(options: RunOptions) -> None:
    """Raise ValueError for a guard, an average or muP, which a training state does not hold."""
    guard, decay = options.guard, options.average.decay
    if options.model.parametrization != "standard":
        raise ValueError(
            f"model.parametrization: found {options.model.parametrization}, expected standard: a state "
            "that moves to torch or comes from there has one learning rate for all parameters"
        )
    for name, value, expected in (
        ("guard.action", guard.action, None),
        ("guard.non-finite", guard.non_finite, 0),
        ("average.decay", decay, None),
    ):
        if value != expected:
            raise ValueError(
                f"{name}: found {value}, expected {expected}: a state that moves to torch or comes "
                "from there holds neither the guard's window nor an average"
            )


def require_intact(state: TrainingState) -> None:
    """Raise ValueError for a file without a digest, or one that is not what the state was written with."""
    directory, files = state.directory, state.manifest["files"]
    manifest = directory / FOLDER / MANIFEST
    for name in listed_files(directory, directory / FOLDER):
        if name not in files:
            raise ValueError(f"{manifest}: files: has no digest of {name}")
    for name, expected in files.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"{manifest}: files: found {name!r}, expected a file in {directory}")
        if not path.is_file():
            raise ValueError(f"{path}: no such file, but {MANIFEST} lists it")
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise ValueError(
                f"{manifest}: files: {name}: found {expected!r}, expected bytes and sha256"
            )
        size, digest = expected["bytes"], expected["sha256"]
        if path.stat().st_size != size:
            raise ValueError(
                f"{path}: found {path.stat().st_size} bytes, expected {size} by {MANIFEST}"
            )
        if (actual := digest_of(path)) != digest:
            raise ValueError(
                f"{path}: found contents with digest {actual[:SHOWN]}, expected {str(digest)[:SHOWN]} by "
                f"{MANIFEST}: copy the directory again"
            )


def listed_files(directory: Path, state: Path) -> dict[str, Path]:
    """The files whose digests a state has: weights, moments, options and batches.

    Args:
        directory: of the model.
        state: of its state, which may still have another name than `directory / FOLDER`.
    """
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors*"))]
    named = {path.name: path for path in files}
    inner = [state / OPTIONS, state / BATCHES]
    inner += [path for name in MOMENTS for path in sorted((state / name).glob("*.safetensors*"))]
    return named | {f"{FOLDER}/{path.relative_to(state).as_posix()}": path for path in inner}


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_moments(state: TrainingState, config: LlamaConfig) -> None:
    """Raise ValueError unless both moments are those of a model of `config`; only headers are read."""
    for name in MOMENTS:
        folder = state.moment(name)
        match = match_checkpoint(LlamaForCausalLM, config, open_weights(folder), folder)
        if problems := [*match.problems, *(f"{name}: missing" for name in match.missing_head)]:
            raise ValueError(summarize(f"{folder}: {len(problems)} problems", problems))
    expected, actual = not_decayed(config), state.manifest["optimizer"].get("no_decay")
    if actual != expected:
        names = sorted({*expected} ^ {*(actual or ())})
        raise ValueError(
            f"{state.directory / FOLDER / MANIFEST}: no_decay: differs at {', '.join(names[:3])}; here "
            "weight decay applies to matrices, not to norms and biases"
        )


def not_decayed(config: LlamaConfig) -> list[str]:
    """Hugging Face's names of the parameters that weight decay does not apply to."""
    model = abstract_model(LlamaForCausalLM, config, "float32")
    return [name for name in name_table(model) if not decays(name)]


def is_adam(node: Any) -> bool:
    """Whether a node of an optimizer's state is Adam's."""
    return isinstance(node, optax.ScaleByAdamState)
