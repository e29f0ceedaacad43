"""Tiny runs of the real program: data, a model, flags, and the contents of a run's folder."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.config import LlamaConfig
from parity_tests.harness.child_process import ROOT
from parity_tests.harness.compilation import FAST_FLAGS
from parity_tests.train.corpus import EOS, token_directory, word_tokenizer
from train import checkpoints
from train.flags import parse_options
from train.monitoring.metrics_log import TIMES, read_metrics
from train.options import FILE as RUN_FILE
from train.options import MeshOptions, RunOptions
from train.options_toml import flags_of
from train.program.build import run_program

VOCAB = 64
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


class Tiny(NamedTuple):
    """data: a token directory. config: a config.json. cache: for compiled programs."""

    data: Path
    config: Path
    cache: Path


def make_tiny(directory: Path, cache: Path | None = None) -> Tiny:
    rng = np.random.default_rng(0)
    eos = 1
    documents = []
    for _ in range(300):
        start, length = rng.integers(3, VOCAB), rng.integers(1, 40)
        # each token determines the next, so that there is something to learn
        documents.append([int(3 + (start + 5 * n) % (VOCAB - 3)) for n in range(length)] + [eos])
    shards = [documents[:130], documents[130:260]]
    data = token_directory(directory / "data", shards, [documents[260:]], vocab_size=VOCAB)
    word_tokenizer(data, ["<s>", EOS, "<unk>", *(f"w{n}" for n in range(VOCAB - 3))])
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return Tiny(data, directory / "config.json", cache or directory / "compiled")


def run_flags(tiny: Tiny, out: Path, **changes: Any) -> list[str]:
    """`run` and its flags; `changes` are named as in run.toml, with `__` for the dot."""
    values = {
        "out": out,
        "data": tiny.data,
        "model__config": tiny.config,
        "batch_size": 8,
        "sequence_length": 16,
        "steps": 12,
        "optimizer__warmup_steps": 2,
        "checkpoint__every": 3,
        "evaluation__every": 4,
        "evaluation__batches": 2,
        "evaluation__sample_tokens": 0,
        "log__peak_flops": 1e9,
    } | changes
    return [
        "run",
        *(
            f"--{name.replace('__', '.').replace('_', '-')}={value}"
            for name, value in values.items()
        ),
    ]


def environment(cache: Path | None, devices: int = 1) -> dict[str, str]:
    """The environment of a child process; `cache` is where compiled programs are kept."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA"))
    }
    added = {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    if devices > 1:  # programs for several devices compile twice as fast like this
        flags = (f"--xla_force_host_platform_device_count={devices}", *FAST_FLAGS)
        added["XLA_FLAGS"] = " ".join(flags)
    if cache is not None:
        added["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        added["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return inherited | added


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def joined_flags(processes: int) -> list[list[str]]:
    """The flags with which each process finds the others."""
    shared = (
        f"--distributed.coordinator=localhost:{free_port()}",
        f"--distributed.processes={processes}",
    )
    return [[*shared, f"--distributed.process-id={number}"] for number in range(processes)]


def start(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, out: str | None = "") -> str:
    """Wait for the process, which must end with `code` and print `out` (None: anything); its stderr."""
    printed, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert out in (None, printed)
    return err


def state_of(run: Path, step: int) -> list[np.ndarray]:
    """Parameters and optimizer state of a checkpoint."""
    options = parse_options(RunOptions(), flags_of(run / RUN_FILE), run / RUN_FILE)
    options = dataclasses.replace(options, mesh=MeshOptions())  # for the devices of this process
    program = run_program(options, LlamaConfig.from_pretrained(run))
    manager = checkpoints.open_manager(run, keep_last=1, keep_every=None, read_only=True)
    restored = checkpoints.restore(manager, program.params, program.opt_state, step)
    assert restored is not None
    return [np.asarray(leaf) for leaf in jax.tree.leaves((restored.params, restored.opt_state))]


def same_bits(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(one, other, strict=True)
    )


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(run)
    ]


def saved_steps(run: Path) -> list[int]:
    return sorted(
        int(path.name) for path in (run / checkpoints.FOLDER).iterdir() if path.name.isdigit()
    )
