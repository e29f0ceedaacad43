"""No file beside the weights, however damaged or odd, is answered by a traceback, a hang or two lines.

Every file is mutated from a fixed seed and handed to the commands that read it, in this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
import tomllib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flax import nnx

from convert.__main__ import main as convert
from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.__main__ import main as llama_jax
from parity_tests.harness.json_mutations import dump_json, mutated
from parity_tests.train.corpus import token_directory
from parity_tests.train.runs import CONFIG, VOCAB
from train.__main__ import main as train
from train.options import FILE as RUN_FILE
from train.options import RunOptions, with_absolute_paths
from train.options_toml import to_toml

SECONDS = (
    30  # that a command may take; a mutation that asks for the impossible is refused, not tried
)
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "llama_jax": llama_jax,
    "convert": convert,
    "train": train,
}
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzĠ", *map("".join, MERGES)]
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": n, "content": TOKENS[n], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for n in range(3)
    ],
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: n for n, token in enumerate(TOKENS)},
        "merges": [list(pair) for pair in MERGES],
    },
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "special": True},
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "model_max_length": 64,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}",
}
GENERATION_CONFIG = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "max_length": 20,
    "max_new_tokens": 5,
    "transformers_version": "5.0.0",
}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, meta: a tiny model. tokens: a token directory. run: the folder of a run without checkpoints."""
    root = tmp_path_factory.mktemp("fuzz")
    fields = CONFIG | {"rope_theta": 1e4, "rope_scaling": ROPE, "torch_dtype": "float32"}
    fields["max_position_embeddings"] = 131072
    config = LlamaConfig.from_dict(fields)
    first = root / "first"
    LlamaForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(first, max_shard_size=20_000)
    files = {
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        "added_tokens.json": {"<s>": 1, "<extra>": 40},
    }
    for name, value in files.items():
        (first / name).write_text(json.dumps(value))
    assert convert([str(first), str(root / "hf"), "--max-shard-size", "20KB"]) == 0
    assert convert([str(first), str(root / "meta"), "--to", "meta", "--no-tokenizer"]) == 0
    documents = [[5, 6, 7, 8, 1]] * 40
    token_directory(root / "tokens", [documents], [documents], vocab_size=VOCAB)
    (root / "tokens" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (root / "text.txt").write_text("hello hello\n" * 20)
    options = RunOptions(
        out=root / "run", data=(str(root / "tokens"),), steps=2, batch_size=2, sequence_length=8
    )
    (root / "run").mkdir()
    (root / "run" / RUN_FILE).write_text(to_toml(with_absolute_paths(options)))
    shutil.copyfile(first / "config.json", root / "run" / "config.json")
    return root


Command = Callable[[Path], list[str]]


def hf(*arguments: str) -> Command:
    """A command of llama_jax on the directory."""
    command, *more = arguments
    return lambda root: ["llama_jax", command, "--model", str(root / "hf"), *more]


def converted(to: str, *more: str, source: str = "hf") -> Command:
    suffix = ".gguf" if to == "gguf" else ""
    return lambda root: [
        "convert",
        str(root / source),
        f"{root / 'out'}{suffix}",
        "--to",
        to,
        *more,
    ]


DRY = [converted(to, "--dry-run") for to in ("hf", "orbax", "gguf", "meta")]
WRITTEN = [converted(to) for to in ("hf", "orbax", "gguf", "meta")]
INFO: list[Command] = [
    lambda root: ["convert", "info", str(root / "hf")],
    lambda root: ["convert", "info", str(root / "hf"), "--json"],
]
MASK = hf("mask", "--text", "hello abc")
GENERATE = [
    hf("generate", "--prompt", "hello", "--max-new-tokens", "2"),
    hf("generate", "--prompt", "hello", "--prompt", "abc", "--max-new-tokens", "2", "--json"),
]
LOAD = hf("generate", "--prompt", "hello", "--cache-size", "1")  # ends before it computes
CHAT = hf("chat", "--max-new-tokens", "2")
SCORE = [hf("score", "--text", "hello abc"), hf("score", "--text", "hello abc", "--rolling")]
QUANTIZE: Command = lambda root: hf("quantize", "--out", str(root / "out"))(root)  # noqa: E731
TOKENIZE: Command = lambda root: [  # noqa: E731
    *("train", "tokenize", str(root / "text.txt"), "--tokenizer", str(root / "hf")),
    *("--out", str(root / "out"), "--validation-fraction", "0.3"),
]
TOKENIZE_ON: Command = lambda root: [  # noqa: E731
    *("train", "tokenize", str(root / "text.txt"), "--tokenizer", str(root / "tokens")),
    *("--out", str(root / "tokens")),
]
RUN: Command = lambda root: [  # noqa: E731
    *("train", "run", "--out", str(root / "out"), "--data", str(root / "tokens")),
    *("--model.config", str(root / "hf"), "--sequence-length", "8", "--steps", "1"),
]
INIT_FROM: Command = lambda root: [  # noqa: E731
    *("train", "run", "--out", str(root / "out"), "--data", str(root / "tokens")),
    *("--model.init-from", str(root / "hf"), "--sequence-length", "8", "--steps", "1"),
]
EVAL: Command = lambda root: [  # noqa: E731
    *("train", "eval", str(root / "hf"), "--data", str(root / "tokens"), "--batches", "1"),
    *("--batch-size", "2", "--sequence-length", "8"),
]
OF_RUN: list[Command] = [
    lambda root: ["train", "resume", str(root / "run")],
    lambda root: ["train", "export", str(root / "run"), str(root / "out")],
    lambda root: ["train", "eval", str(root / "run")],
    lambda root: [
        "train",
        "run",
        "--toml",
        str(root / "run" / RUN_FILE),
        "--out",
        str(root / "out"),
    ],
]
META = [
    converted(to, "--dry-run", "--no-tokenizer", source="meta") for to in ("hf", "orbax", "gguf")
]
META_INFO: Command = lambda root: ["convert", "info", str(root / "meta")]  # noqa: E731
ARCHITECTURE: Command = lambda root: ["llama_jax", "info", str(root / "hf")]  # noqa: E731

# file: the commands that read it, those that only load, then those that compute
READERS: dict[str, tuple[list[Command], list[Command]]] = {
    "hf/config.json": (
        [*INFO, *DRY, MASK],
        [ARCHITECTURE, *GENERATE, *SCORE, *WRITTEN, RUN, INIT_FROM, EVAL, QUANTIZE],
    ),
    "hf/generation_config.json": (
        [*INFO, *DRY, LOAD, LOAD],
        [*GENERATE, CHAT, *WRITTEN, QUANTIZE, INIT_FROM],
    ),
    "hf/tokenizer.json": (
        [*INFO, *DRY, MASK, TOKENIZE],
        [*GENERATE, *SCORE, CHAT, *WRITTEN, TOKENIZE, QUANTIZE, EVAL, INIT_FROM],
    ),
    "hf/tokenizer_config.json": (
        [*INFO, *DRY, MASK, TOKENIZE],
        [*GENERATE, *SCORE, CHAT, CHAT, *WRITTEN, TOKENIZE, QUANTIZE],
    ),
    "hf/special_tokens_map.json": (
        [*INFO, *DRY, MASK, TOKENIZE],
        [*GENERATE, CHAT, *WRITTEN, TOKENIZE, QUANTIZE],
    ),
    "hf/added_tokens.json": (
        [*INFO, *DRY, MASK, TOKENIZE],
        [*GENERATE, CHAT, *WRITTEN, TOKENIZE, QUANTIZE],
    ),
    "hf/model.safetensors.index.json": (
        [*INFO, *DRY],
        [*GENERATE, *SCORE, *WRITTEN, INIT_FROM, EVAL, QUANTIZE],
    ),
    "hf/conversion.json": ([*INFO, *DRY], [*WRITTEN]),
    "meta/params.json": ([META_INFO, *META], [converted("hf", "--no-tokenizer", source="meta")]),
    "tokens/index.json": ([TOKENIZE_ON, RUN], [EVAL, INIT_FROM, TOKENIZE_ON]),
    "run/run.toml": (OF_RUN, OF_RUN),
    "run/config.json": (OF_RUN[:3], OF_RUN[:3]),
}


class TooLong(BaseException):
    """A command took more than SECONDS."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What is wrong with how a command ended; None where nothing is."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    program, *rest = arguments
    try:
        with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = PROGRAMS[program](rest)
    except TooLong:
        return f"took more than {SECONDS} s"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            t
            for t in traceback.extract_tb(error.__traceback__)
            if "site-packages" not in t.filename
        ]
        return (
            f"{type(error).__name__}: {str(error)[:200]} at {place.filename}:{place.lineno}, called at "
            f"{ours[-1].filename}:{ours[-1].lineno}"
        )
    lines = err.getvalue().splitlines()
    # 1: the answer of `convert info`, which lists the problems in its table
    if code not in ((0, 1, 2) if arguments[:2] == ["convert", "info"] else (0, 2)):
        return f"exit code {code}: {lines[-1:]}"
    if code == 2 and (not lines or not lines[-1].startswith("error: ")):
        return f"no line of error: {lines[-3:]}"
    if sum(line.startswith("error: ") for line in lines) != (code == 2):
        return f"{lines[-3:]}"
    if code == 2 and len(lines[-1]) > 3000:
        return f"an error of {len(lines[-1])} characters: {lines[-1][:300]}"
    return None


def fuzz(root: Path, file: str, count: int, seed: int, compute: float,
         monkeypatch: pytest.MonkeyPatch) -> list[str]:  # fmt: skip
    """What went wrong with `count` mutations, each handed to one of the commands that read the file."""
    # training itself is not what the file is read for
    for module in ("begin", "resume"):
        monkeypatch.setattr(f"train.run.{module}.train_loop", lambda *_, **__: None)
    path = root / file
    content = path.read_bytes()
    toml = path.suffix == ".toml"
    parsed = tomllib.loads(content.decode()) if toml else json.loads(content)
    rng = random.Random(f"{file} {seed}")
    loading, computing = READERS[file]
    wrong = []
    try:
        for number in range(count):
            while True:
                try:
                    path.write_bytes(
                        mutated(content, rng, dump_toml if toml else dump_json, parsed)
                    )
                    break
                except (TypeError, ValueError, OverflowError, AttributeError):
                    continue  # TOML cannot say it
            command = rng.choice(computing if rng.random() < compute else loading)(root)
            fault = outcome(command, monkeypatch)
            if fault is not None:
                shown = " ".join(each.removeprefix(str(root)) for each in command)
                text = path.read_bytes()
                wrong.append(f"{number}: {shown}: {fault}; {file}: {text[:300]!r}")
                if len(text) < 20_000:
                    (root / f"{path.name}.{number}").write_bytes(text)
            remove(root / "out")
            remove(root / "out.gguf")
            remove(root / "out.gguf.conversion.json")
    finally:
        path.write_bytes(content)
    return wrong


def dump_toml(value: Any) -> bytes:
    return tomli_w.dumps(value).encode()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("file", READERS)
def test_a_sample_of_mutations(root: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(root, file, 20, 0, 0.0, monkeypatch) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", READERS)
def test_two_thousand_mutations(root: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(root, file, 2000, 1, 0.1, monkeypatch) == []
