"""`python -m llama_jax`: what it prints, and one line with exit code 2 for each mistake."""

import json
from pathlib import Path

import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.__main__ import main

WORDS = ["the", "capital", "of", "France", "is", "Paris", "and", "a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model"
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        eos_token_id=None,
    )
    LlamaForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(path)
    vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def generate(directory: Path, *more: str, prompt: str = "the capital of France is") -> int:
    return main(["generate", "--model", str(directory), "--prompt", prompt, *more])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_generate_continues_the_prompt(directory, capsys):
    assert generate(directory, "--max-new-tokens", "5") == 0
    captured = capsys.readouterr()
    text = captured.out.split()
    assert text[:5] == ["the", "capital", "of", "France", "is"]
    assert len(text) == 10
    assert "5 tokens in" in captured.err
    assert "warning" not in captured.err


def test_generate_beyond_the_trained_context_warns(directory, capsys):
    assert generate(directory, "--max-new-tokens", "20") == 0
    captured = capsys.readouterr()
    assert "warning: 5 prompt tokens and 20 new ones go beyond max_position_embeddings=16" in (
        captured.err
    )


def test_generate_beyond_the_cache_is_an_error(directory, capsys):
    assert generate(directory, "--max-new-tokens", "8", "--cache-size", "11") == 2
    assert "expected a cache of at least 12 slots, found 11" in error_line(capsys)


def test_generate_from_nothing(directory, capsys):
    assert generate(directory, prompt="") == 2
    assert "--prompt: found no tokens" in error_line(capsys)


def test_no_such_directory(tmp_path, capsys):
    assert generate(tmp_path / "absent") == 2
    assert "no such directory" in error_line(capsys)


def copy_of(directory: Path, tmp_path: Path) -> Path:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json: not found"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"model_type": "bert"}', "model_type: found 'bert', expected 'llama'"),
        ("tokenizer.json", None, "tokenizer.json: not found"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
        ("model.safetensors", None, "expected weights"),
        ("model.safetensors", b"12345", "expected a safetensors file"),
        ("generation_config.json", b"[]", "expected an object"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "expected an integer"),
        ("generation_config.json", b'{"eos_token_id": 2.5}', "found 2.5, expected an integer"),
        ("generation_config.json", b'{"pad_token_id": [1]}', "found [1], expected an integer"),
        ("generation_config.json", b'{"eos_token_id": 99999999999}', "expected an integer"),
    ],
)
def test_a_bad_file(directory, tmp_path, capsys, file, content, message):
    copy = copy_of(directory, tmp_path)
    (copy / file).unlink(missing_ok=True)
    if content is not None:
        (copy / file).write_bytes(content)
    assert generate(copy) == 2
    assert message in error_line(capsys)


def test_a_token_outside_the_vocabulary(directory, tmp_path, capsys):
    copy = copy_of(directory, tmp_path)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 99
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert generate(copy, prompt="the beyond") == 2
    assert "found token 99, expected 0 to 12" in error_line(capsys)


def test_info_of_a_preset(capsys):
    assert main(["info", "llama-3.1-8b", "--seq", "4096"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "8,030,261,248",
        "32 x 58,720,256",
        "131,072 bytes",
        "1 x 4096 x 128256",
        "llama3",
    ):
        assert part in shown


def test_info_of_a_directory(directory, capsys):
    assert main(["info", str(directory)]) == 0
    assert "model.layers.[0-1].self_attn.q_proj.weight" in capsys.readouterr().out


def test_info_of_neither(capsys):
    assert main(["info", "llama-9"]) == 2
    assert "neither a directory nor a preset, expected one of llama-7b" in error_line(capsys)


@pytest.mark.parametrize("value", ["0", "-3", "x"])
def test_a_count_that_is_none(directory, capsys, value):
    assert generate(directory, "--max-new-tokens", value) == 2
    assert f"--max-new-tokens: found {value!r}, expected a positive" in error_line(capsys)


@pytest.mark.parametrize("arguments", [[], ["chatter"], ["info"], ["generate", "--model", "x"]])
def test_arguments_that_make_no_command(capsys, arguments):
    assert main(arguments) == 2
    assert "see --help" in error_line(capsys)


@pytest.mark.parametrize("count", ["1000000000000", "99999999999999999999"])
def test_more_tokens_than_memory_holds(directory, capsys, count):
    assert generate(directory, "--max-new-tokens", count) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")


def test_a_prompt_that_is_not_text(directory, capsys):
    assert generate(directory, prompt="\udcff") == 2
    assert "not UTF-8" in error_line(capsys)


def test_a_file_for_a_directory_names_the_converter(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert generate(tmp_path / "model.gguf") == 2
    assert "python -m convert" in error_line(capsys)
