"""Everything that README.md tells the reader to run does run."""

import importlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import jax
import pyarrow as pa
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_jax import LlamaConfig, LlamaForCausalLM
from parity_tests.harness.child_process import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("python -m ")
]
# what keeps a command small; the reader's own does not need it
SMALL = {
    "train run": "--steps 2 --batch-size 2 --sequence-length 16 --evaluation.batches 1",
    "llama_jax generate": "--max-new-tokens 4",
    "llama_jax chat": "--max-new-tokens 4",
}
TEXTS = ["The capital of France is Paris, and the river there is the Seine."] * 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the names in README.md stand for: SRC and DIR, a checkpoint, and corpus/."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = Tokenizer(
        models.BPE(vocab={s: i for i, s in enumerate(["<|endoftext|>", *_alphabet()])}, merges=[])
    )
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
        said = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "chat_template": "{% for message in messages %}{{ message.content }}\n{% endfor %}",
        }
        (folder / name / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "corpus").mkdir()
    lines = "".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n, text in enumerate(TEXTS))
    with pa.CompressedOutputStream(str(folder / "corpus" / "a.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    return folder


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def test_the_readme_fits_a_screen_or_two():
    assert len(README.splitlines()) <= 130


def test_the_quickstart(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (code,) = (block for language, block in BLOCKS if language == "python")
    # as in the reader's own program: the suite's strictness is not asked of it, nor of optax
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), {})
    assert (folder / "out" / "config.json").is_file()
    assert "(1, 4, 4096)" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[2:4]))
def test_the_commands(command, folder, monkeypatch):
    """In their order: what one writes a later one reads."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert command[:2] == ["python", "-m"]
    program, arguments = command[2], command[3:]
    if arguments[0] == "plan":
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("libtpu is not installed: pip install '.[plan]'")
        arguments = [*arguments[:3], "--model.preset", "tiny-4m", "--batch-size", "64"]
    more = SMALL.get(f"{program} {arguments[0]}", "").split()
    main = importlib.import_module(f"{program}.__main__").main
    assert main([*arguments, *more]) == 0


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target
