"""What README.md and the guides in docs/ tell the reader to run does run."""

import importlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pyarrow as pa
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import convert
from llama_jax import LlamaConfig, LlamaForCausalLM
from parity_tests.harness.child_process import ROOT
from train.__main__ import _parser as train_parser
from train.hardware.gpu_compiler import COMPILER_FOLDER


def code_blocks(text: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [code for block_language, code in blocks if block_language == language]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m ...`, without comments and the shell's `&`."""
    lines = "\n".join(code_blocks(text, "")).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.removesuffix("&"), comments=True)
        for line in lines
        if line.startswith("python -m ")
    ]


README = (ROOT / "README.md").read_text()
GUIDES = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
# options that keep a command small in the test
SMALL = {
    "train run": "--steps 2 --batch-size 2 --sequence-length 16 --evaluation.batches 1",
    "llama_jax generate": "--max-new-tokens 4",
    "llama_jax chat": "--max-new-tokens 4",
}
TRAIN_COMMANDS = [
    command[3:] for page in GUIDES.values() for command in commands(page) if command[2] == "train"
]
TEXTS = ["The capital of France is Paris, and the river there is the Seine."] * 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that README.md and the guides name: the checkpoints SRC and DIR, and corpus/."""
    folder = tmp_path_factory.mktemp("readme")
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Th"]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("T", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    for name in ("SRC", "DIR"):
        LlamaForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "chat_template": "{% for message in messages %}{{ message.content }}\n{% endfor %}",
        }
        (folder / name / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "corpus").mkdir()
    lines = "".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n, text in enumerate(TEXTS))
    with pa.CompressedOutputStream(str(folder / "corpus" / "a.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    return folder


def test_readme_is_short():
    assert len(README.splitlines()) <= 130


def run_as_reader(code: str) -> None:
    """Run code without the strict promotion rules of the suite, which optax does not follow either."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "documentation", "exec"), {})


def test_quickstart(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (code,) = code_blocks(README, "python")
    run_as_reader(code)
    assert (folder / "out" / "config.json").is_file()
    assert "(1, 4, 4096)" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands(README), ids=lambda command: "-".join(command[2:4]))
def test_commands(command, folder, monkeypatch):
    """In the order of the README: some read what an earlier one wrote."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert command[:2] == ["python", "-m"]
    program, arguments = command[2], command[3:]
    if arguments[0] == "plan":
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("libtpu is not installed: pip install '.[plan]'")
        if "h100" in arguments[2] and not COMPILER_FOLDER.is_dir():
            pytest.skip("the compiler for GPUs is not installed: make plan-gpu")
        # a process of its own: JAX has chosen its devices in this one
        tiny = [*arguments[:3], "--model.preset", "tiny-4m", "--batch-size", "64"]
        done = subprocess.run([sys.executable, "-m", program, *tiny], cwd=ROOT, check=False)
        assert done.returncode == 0
        return
    small = SMALL.get(f"{program} {arguments[0]}", "").split()
    main = importlib.import_module(f"{program}.__main__").main
    assert main([*arguments, *small]) == 0


def test_links_in_the_readme():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", [name for name in GUIDES if code_blocks(GUIDES[name], "python")])
def test_python_in_the_guides(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if page == "conversion":
        convert.convert("SRC", "model.gguf")
    for code in code_blocks(GUIDES[page], "python"):
        run_as_reader(code)


@pytest.mark.parametrize("arguments", TRAIN_COMMANDS, ids=" ".join)
def test_training_flags_in_the_guides(arguments):
    """They are parsed, not run."""
    train_parser().parse_args(arguments)


@pytest.mark.parametrize(
    "command", commands(GUIDES["traces"]), ids=lambda command: "-".join(command[2:5])
)
def test_commands_of_traces(command, folder, monkeypatch):
    """After the Python of that page; the port called BROKEN is."""
    monkeypatch.chdir(folder)
    main = importlib.import_module(f"{command[2]}.__main__").main
    assert main(command[3:]) == (1 if "BROKEN" in command else 0)
