"""The layout of a run's folder.

run.toml                 the options, with all defaults filled in; its presence makes the folder a run
config.json              the model's configuration
data.json                digests of the training data
tokenizer/               the tokenizer of the data
generation_config.json   of the checkpoint that the run started from, if it had one
checkpoints/             see `train.checkpoints`
metrics.jsonl, loss.png  see `train.monitoring.metrics_log`
heartbeat.json           see `train.monitoring.heartbeat`
events.jsonl             see `train.monitoring.history`
report.html, statistics/ see `train.monitoring.report_page`
exports/STEP/            Hugging Face directories, with --export-every
"""

import json
from collections.abc import Sequence
from pathlib import Path

from llama_jax.config import LlamaConfig
from llama_jax.files.staging import write_text
from llama_jax.text.companions import RUN_TOKENIZER, copy_companions
from train import checkpoints
from train.data import identity
from train.data.tokens import Source
from train.options import FILE, RunOptions
from train.options_toml import to_toml

CONFIG = "config.json"
EXPORTS = "exports"


def require_new(folder: Path) -> None:
    """Raise ValueError for a folder in which no run can begin: it has one already, or is a file."""
    if (folder / FILE).exists():
        if not last_saved_step(folder):
            raise ValueError(
                f"{folder}: contains a run without a checkpoint; remove it to begin again, or choose "
                "another --out"
            )
        raise ValueError(
            f"{folder}: already contains a run; choose another --out, or resume it with "
            f"`python -m train resume {folder}`"
        )
    if (folder / checkpoints.FOLDER).exists():
        raise ValueError(f"{folder}: already contains checkpoints; choose another --out")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another --out")


def write_folder(
    folder: Path,
    options: RunOptions,
    config: LlamaConfig,
    sources: Sequence[Source],
    tokenizer: Path,
) -> None:
    """Write what a new run begins with.

    Args:
        sources: of the data.
        tokenizer: the directory whose tokenizer is copied.
    """
    copy_companions(tokenizer, folder / RUN_TOKENIZER, generation=False)
    if options.model.init_from is not None:
        copy_companions(options.model.init_from, folder, tokenizer=False)
    write_text(folder / CONFIG, json.dumps(config.to_dict(), indent=2) + "\n")
    identity.write_identity(folder, sources)
    # last, as it turns the folder into a run
    write_text(folder / FILE, to_toml(options))


def replace_options(folder: Path, options: RunOptions) -> None:
    """Write run.toml anew, in one step."""
    staged = folder / f".{FILE}.tmp"
    write_text(staged, to_toml(options))
    staged.replace(folder / FILE)


def last_saved_step(folder: Path) -> int:
    """The step of the newest checkpoint, damaged or not; 0 without one."""
    saved = (folder / checkpoints.FOLDER).glob("*")
    return max((int(path.name) for path in saved if path.name.isdigit()), default=0)
