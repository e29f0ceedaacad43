"""Tiny runs in which something goes wrong, planted with no help from `train.autopsy`.

What varies with the seed: the data, the model's shape, the optimizer, the place, size and kind of the
fault, and how many steps later the autopsy is asked for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from llama_jax.config import LlamaConfig
from parity_tests.train.corpus import EOS, token_directory, word_tokenizer
from parity_tests.train.runs import CONFIG, Tiny, run_flags
from train import checkpoints
from train.__main__ import main
from train.data.provenance import batch_rows
from train.data.sources import find_sources
from train.flags import parse_options
from train.options import FILE, RunOptions
from train.options_toml import flags_of, to_toml
from train.program.build import run_program

FAULTS = ("document", "learning rate", "second moment", "layer")
STEPS, BATCH, LENGTH, DOCUMENTS = 64, 8, 24, 260

# models and optimizers; few, since each is compiled
SHAPES: tuple[dict[str, Any], ...] = (
    {"layers": 2, "hidden": 32, "heads": 4, "vocab": 64, "optimizer": "adamw", "rate": 3e-3},
    {"layers": 4, "hidden": 32, "heads": 2, "vocab": 96, "optimizer": "muon", "rate": 3e-3},
    {"layers": 3, "hidden": 48, "heads": 4, "vocab": 80, "optimizer": "adamw", "rate": 1.5e-3},
    {"layers": 2, "hidden": 48, "heads": 2, "vocab": 64, "optimizer": "muon", "rate": 5e-3},
)


class Planted(NamedTuple):
    """run: the folder. step: to ask about. fault: one of `FAULTS`, or "" for none. what: in words.

    history: steps that the autopsy may go by. document: (first token, end) of a poisoned document.
    layer: of a dead one.
    """

    run: Path
    step: int
    fault: str
    what: str
    history: int = 32
    document: tuple[int, int] | None = None
    layer: int | None = None


def plant(fault: str, seed: int, directory: Path) -> Planted:
    """A run of `fault`, which is a function of the seed."""
    rng = np.random.default_rng([seed, FAULTS.index(fault)])
    shape = SHAPES[seed % len(SHAPES)]
    planters: dict[str, Callable[..., Planted]] = {
        "document": _poison,
        "learning rate": _jump,
        "second moment": _corrupt,
        "layer": _kill,
    }
    planted = planters[fault](rng, shape, seed, directory)
    return planted._replace(history=int(rng.choice([12, 32])))


def undisturbed(seed: int, directory: Path) -> Path:
    """A run in which nothing goes wrong."""
    rng = np.random.default_rng([seed, 99])
    shape = SHAPES[seed % len(SHAPES)]
    tiny = _tiny(directory, shape, _documents(rng, shape["vocab"]))
    _train(_flags(tiny, shape, seed, directory / "run"))
    return directory / "run"


def _documents(rng: np.random.Generator, vocab: int) -> list[list[int]]:
    """Sequences in which each token follows from the last, up to noise of a tenth."""
    stride = int(rng.integers(2, 12))
    documents = []
    for _ in range(DOCUMENTS):
        token, ids = int(rng.integers(3, vocab)), []
        for _ in range(int(rng.integers(6, 60))):
            ids.append(token)
            token = 3 + (token - 3 + stride) % (vocab - 3)
            if rng.random() < 0.1:
                token = int(rng.integers(3, vocab))
        documents.append([*ids, 1])
    return documents


def _tiny(directory: Path, shape: dict[str, Any], documents: list[list[int]]) -> Tiny:
    vocab = shape["vocab"]
    data = token_directory(directory / "data", [documents], [documents[:3]], vocab_size=vocab)
    word_tokenizer(data, ["<s>", EOS, "<unk>", *(f"w{n}" for n in range(vocab - 3))])
    config = CONFIG | {
        "vocab_size": vocab,
        "hidden_size": shape["hidden"],
        "intermediate_size": 2 * shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return Tiny(data, directory / "config.json", directory / "compiled")


def _flags(tiny: Tiny, shape: dict[str, Any], seed: int, out: Path, **changes: Any) -> list[str]:
    defaults = {
        "steps": STEPS,
        "seed": seed,
        "batch_size": BATCH,
        "sequence_length": LENGTH,
        "optimizer__name": shape["optimizer"],
        "optimizer__learning_rate": shape["rate"],
        "optimizer__schedule": "constant",
        "optimizer__warmup_steps": 8,
        "evaluation__every": 0,
        "checkpoint__every": 16,
        "checkpoint__keep_last": 99,
    }
    return run_flags(tiny, out, **defaults | changes)


def _train(arguments: list[str]) -> None:
    assert main(arguments) == 0


def _poison(rng: np.random.Generator, shape: dict[str, Any], seed: int, directory: Path) -> Planted:
    """One document is garbage; asked about is a step that has much of it."""
    documents = _documents(rng, shape["vocab"])
    number, length = int(rng.integers(len(documents))), int(rng.integers(30, 120))
    kind = ("random", "reversed", "one token", "two tokens")[int(rng.integers(4))]
    ids = rng.integers(3, shape["vocab"], length)
    if kind == "one token":
        ids[:] = ids[0]
    elif kind == "two tokens":
        ids = np.where(rng.random(length) < 0.5, ids[0], ids[1])
    elif kind == "reversed":
        long = [t for document in documents for t in document if t >= 3]
        ids = np.array(long[:length][::-1])
    documents[number] = [*map(int, ids), 1]
    first = sum(map(len, documents[:number]))
    end = first + len(documents[number])
    tiny = _tiny(directory, shape, documents)
    run = directory / "run"
    _train(_flags(tiny, shape, seed, run))
    sources = find_sources([str(tiny.data)])
    tokens = {}
    for step in range(24, STEPS + 1):
        rows = batch_rows(sources, step, batch_size=BATCH, sequence_length=LENGTH, seed=seed)
        parts = [max(0, min(r["tokens"][1], end) - max(r["tokens"][0], first)) for r in rows]
        tokens[step] = max(parts)
    most = max(tokens, key=lambda step: tokens[step])
    what = f"{kind}, {tokens[most]} of {length} tokens in the batch"
    return Planted(run, most, "document", what, document=(first, end))


def _jump(rng: np.random.Generator, shape: dict[str, Any], seed: int, directory: Path) -> Planted:
    """The rate is edited in run.toml, and in the checkpoint, which would tell, while the run is stopped."""
    run, tiny = directory / "run", _tiny(directory, shape, _documents(rng, shape["vocab"]))
    stop, later = int(rng.integers(20, 48)), int(rng.integers(1, 5))
    factor = float(np.exp(rng.uniform(np.log(4), np.log(40))))
    _train(_flags(tiny, shape, seed, run, steps=stop))
    options = options_of(run)
    optimizer = replace(options.optimizer, learning_rate=factor * shape["rate"])
    text = to_toml(replace(options, optimizer=optimizer, steps=stop + 8))
    (run / FILE).write_text(text)
    resave(run, stop, lambda *state: state, options=text)
    _train(["resume", str(run)])
    return Planted(run, stop + later, "learning rate", f"{factor:.1f} times, {later} steps before")


def _corrupt(
    rng: np.random.Generator, shape: dict[str, Any], seed: int, directory: Path
) -> Planted:
    """The second moment of one parameter, or of all, is damaged in a checkpoint."""
    kind = ("scaled down", "zero", "some zero", "scaled up")[int(rng.integers(4))]
    factor = float(10.0 ** rng.uniform(2, 7))
    which = rng.random()

    def damage(state: np.ndarray) -> np.ndarray:
        if kind == "zero":
            return np.zeros_like(state)
        if kind == "some zero":
            return np.where(rng.random(state.shape) < 0.2, 0, state).astype(state.dtype)
        return (state / factor if kind == "scaled down" else state * factor).astype(state.dtype)

    chosen: list[str] = []

    def edit(params: Any, opt_state: Any) -> tuple[Any, Any]:
        def is_adam(node: Any) -> bool:
            return isinstance(node, optax.ScaleByAdamState)

        def change(node: Any) -> Any:
            if not is_adam(node):
                return node
            flat, tree = jax.tree_util.tree_flatten_with_path(node.nu)
            matrices = [i for i, (_, leaf) in enumerate(flat) if leaf.ndim > 1]
            picked = (
                range(len(flat)) if which < 0.3 else [matrices[int(rng.integers(len(matrices)))]]
            )
            leaves = [np.array(leaf) for _, leaf in flat]
            for index in picked:
                chosen.append(jax.tree_util.keystr(flat[index][0], simple=True, separator="."))
                if which > 0.6 and leaves[index].ndim == 3:
                    layer = int(rng.integers(len(leaves[index])))
                    leaves[index][layer] = damage(leaves[index][layer])
                else:
                    leaves[index] = damage(leaves[index])
            return node._replace(nu=jax.tree.unflatten(tree, leaves))

        return params, jax.tree.map(change, opt_state, is_leaf=is_adam)

    run, step, how = _edited(rng, shape, seed, directory, edit)
    named = chosen[0] if len(chosen) == 1 else f"{len(chosen)} parameters"
    return Planted(run, step, "second moment", f"{kind} ({factor:.0e}), {named}, {how}")


def _kill(rng: np.random.Generator, shape: dict[str, Any], seed: int, directory: Path) -> Planted:
    """Weights of a layer are zero in a checkpoint."""
    layer = int(rng.integers(shape["layers"]))
    kind = ("all", "MLP", "attention", "norms", "norm of the MLP")[int(rng.integers(5))]
    parts = {
        "all": [""],
        "MLP": [".mlp."],
        "attention": [".self_attn."],
        "norms": ["layernorm"],
        "norm of the MLP": ["post_attention_layernorm"],
    }[kind]

    def edit(params: Any, opt_state: Any) -> tuple[Any, Any]:
        def change(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if ".layers." not in name or not any(part in name for part in parts):
                return leaf
            values = np.array(leaf)
            values[layer] = 0
            return values

        return jax.tree_util.tree_map_with_path(change, params), opt_state

    run, step, how = _edited(rng, shape, seed, directory, edit)
    return Planted(run, step, "layer", f"{kind} of layer {layer}, {how}", layer=layer)


def _edited(
    rng: np.random.Generator,
    shape: dict[str, Any],
    seed: int,
    directory: Path,
    edit: Callable[[Any, Any], tuple[Any, Any]],
) -> tuple[Path, int, str]:
    """A run that was resumed from a checkpoint with an edited state; without older ones in half of them."""
    run, tiny = directory / "run", _tiny(directory, shape, _documents(rng, shape["vocab"]))
    stop, later = int(rng.integers(20, 48)), int(rng.integers(1, 4))
    _train(_flags(tiny, shape, seed, run, steps=stop))
    resave(run, stop, edit)
    alone = bool(rng.random() < 0.5)
    if alone:
        for path in (run / checkpoints.FOLDER).iterdir():
            if path.name.isdigit() and int(path.name) < stop:
                shutil.rmtree(path)
    _train(["resume", str(run), f"--steps={stop + 8}"])
    return run, stop + later, f"{later} steps before{', no older checkpoint' if alone else ''}"


def resave(run: Path, step: int, edit: Callable[[Any, Any], tuple[Any, Any]], **facts: Any) -> None:
    """Save the checkpoint of a step again, with `edit` of its parameters and optimizer state."""
    program = run_program(options_of(run), LlamaConfig.from_pretrained(run))
    with closing(checkpoints.open_manager(run, keep_last=99, keep_every=None)) as manager:
        restored = checkpoints.restore(manager, program.params, program.opt_state, step)
        assert restored is not None
        state = jax.tree.map(jax.numpy.asarray, edit(restored.params, restored.opt_state))
        checkpoints.save(manager, step, *state, checkpoints.facts_of(manager, step) | facts)
        checkpoints.wait(manager)


def options_of(run: Path) -> RunOptions:
    return parse_options(RunOptions(), flags_of(run / FILE), run / FILE)


def judge(planted: Planted, found: dict[str, Any]) -> bool:
    """Whether the first cause in the JSON of an autopsy is what was planted."""
    if not found["causes"]:
        return False
    first = found["causes"][0]
    if first["kind"] != planted.fault:
        return False
    if planted.document is not None:
        begin, end = planted.document
        return any(d["tokens"][0] < end and d["tokens"][1] > begin for d in first["documents"])
    return planted.layer is None or f"layer {planted.layer}" in first["name"]
