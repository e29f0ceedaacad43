"""`python -m llama_jax`: what it prints, and one line with exit code 2 for each mistake."""

import io
import json
import re
from pathlib import Path

import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from llama_jax import PRESETS, LlamaConfig, LlamaForCausalLM
from llama_jax.__main__ import main
from llama_jax.cli import chat as chat_command
from llama_jax.cli.arguments import Parser, some_text
from llama_jax.generation import loop

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
    assert "warning: 5 prompt tokens and 20 new ones exceed max_position_embeddings=16" in (
        captured.err
    )


def test_generate_beyond_the_cache_is_an_error(directory, capsys):
    assert generate(directory, "--max-new-tokens", "8", "--cache-size", "11") == 2
    assert "--cache-size: found 11, expected at least 12" in error_line(capsys)


def test_generate_from_nothing(directory, capsys):
    assert generate(directory, prompt="") == 2
    assert "--prompt: tokenizes to no tokens" in error_line(capsys)


def test_several_prompts_are_one_batch(directory, capsys):
    arguments = ("--prompt", "Paris is", "--max-new-tokens", "4", "--json")
    assert generate(directory, *arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["the capital of France is", "Paris is"]
    assert [row.pop("index") for row in rows] == [0, 1]
    assert main(["generate", "--model", str(directory), *arguments]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row.pop("index") == 0
    assert row == rows[1]
    assert (row["new_tokens"], row["finish_reason"]) == (4, "length")


def test_prompts_are_printed_as_they_end_and_then_nothing_is_decoded(
    directory, capsys, monkeypatch
):
    decoded = 0
    decode = loop._decode

    def counting(*arguments):
        nonlocal decoded
        decoded += 1
        return decode(*arguments)

    monkeypatch.setattr(loop, "_decode", counting)
    words = []
    for prompt in ("the capital of France is", "Paris is"):
        assert generate(directory, "--json", "--max-new-tokens", "7", prompt=prompt) == 0
        words.append(json.loads(capsys.readouterr().out)["text"].split())
    # the second ends with its first word, unless that is the first one's as well
    late = next(n for n, word in enumerate(words[0]) if word != words[1][0])
    decoded = 0
    stops = ("--stop", words[1][0], "--stop", words[0][late])
    more = ("--prompt", "Paris is", "--max-new-tokens", "7", "--json")
    assert generate(directory, *more, *stops) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["finish_reason"] for row in rows] == ["stop", "stop"]
    by_end = sorted(rows, key=lambda row: (row["new_tokens"], row["index"]))
    assert rows == by_end
    assert decoded == rows[-1]["new_tokens"] - 1


def test_a_stop_string_ends_and_is_left_out(directory, capsys):
    assert generate(directory, "--max-new-tokens", "6", "--json") == 0
    words = json.loads(capsys.readouterr().out)["text"].split()
    assert generate(directory, "--max-new-tokens", "6", "--json", "--stop", words[2]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["text"].split() == words[: words.index(words[2])]
    assert row["finish_reason"] == "stop"


def test_json_has_the_tokens(directory, capsys):
    assert generate(directory, "--max-new-tokens", "4", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["prompt_ids"] == [1, 2, 3, 4, 5]
    assert row["new_tokens"] == len(row["ids"]) == 4
    assert row["text"].split() == [["<unk>", *WORDS][token] for token in row["ids"]]
    # the token that ends the text is one of them
    arguments = ("--max-new-tokens", "4", "--json", "--stop-id", str(row["ids"][0]))
    assert generate(directory, *arguments) == 0
    ended = json.loads(capsys.readouterr().out)
    assert (ended["ids"], ended["text"], ended["finish_reason"]) == (row["ids"][:1], "", "stop")


def test_a_stop_string_may_be_a_special_token(directory, tmp_path, capsys):
    assert generate(directory, "--max-new-tokens", "6", "--json") == 0
    ids = json.loads(capsys.readouterr().out)["ids"]
    copy = copy_of(directory, tmp_path)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    word = tokenizer.id_to_token(ids[2])
    tokenizer.add_special_tokens([word])
    tokenizer.save(str(copy / "tokenizer.json"))
    assert generate(copy, "--max-new-tokens", "6", "--json", "--stop", word) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["ids"], row["finish_reason"]) == (ids[: ids.index(ids[2]) + 1], "stop")
    assert word not in row["text"]
    assert generate(copy, "--stop", "") == 2
    assert "--stop: found an empty text" in error_line(capsys)


def test_a_seed_draws_the_same_again(directory, capsys):
    def draw(seed: str) -> str:
        assert generate(directory, "--temperature", "2", "--seed", seed) == 0
        return capsys.readouterr().out

    assert draw("1") == draw("1")
    assert draw("1") != draw("2")


TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if messages[-1].content == 'wrong' %}{{ raise_exception('no such turn') }}{% endif %}"
)


def chat(directory: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", "--model", str(directory), "--max-new-tokens", "3"])


@pytest.mark.filterwarnings("ignore:.*max_position_embeddings")
def test_chat_keeps_the_conversation(directory, tmp_path, capsys, monkeypatch):
    copy = copy_of(directory, tmp_path)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    seen = []
    encode = chat_command.encode
    monkeypatch.setattr(
        chat_command,
        "encode",
        lambda t, text, *a, **k: seen.append(text) or encode(t, text, *a, **k),
    )
    assert chat(copy, monkeypatch, "the capital\n\nand a\n") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert len(first.split()) == len(second.split()) == 3
    assert seen[1] == f"user the capital assistant {first} user and a "
    assert chat(copy, monkeypatch, "wrong\n") == 2
    assert "chat template: no such turn" in error_line(capsys)


def test_chat_runs_what_is_new_and_forgets_what_does_not_fit(
    directory, tmp_path, capsys, monkeypatch
):
    copy = copy_of(directory, tmp_path)
    prompt = "{% if add_generation_prompt %}assistant {% endif %}"
    (copy / "chat_template.jinja").write_text(TEMPLATE + prompt)
    run = []
    prefill = loop._prefill

    def counting(model, ids, is_token, *rest, **more):
        run.append(int(is_token.sum()))
        return prefill(model, ids, is_token, *rest, **more)

    monkeypatch.setattr(loop, "_prefill", counting)
    assert chat(copy, monkeypatch, "the capital\nand\nof a b\n") == 0
    captured = capsys.readouterr()
    # the last token of an answer is run with the next turn; then only "user" is as before
    assert run == [4, 1 + 3, 4]
    assert captured.err == (
        "warning: the context of 16 tokens is full: the oldest turns are forgotten (2)\n"
    )
    last = captured.out.splitlines()[2].split()
    assert generate(copy, "--json", "--max-new-tokens", "3", prompt="user of a b assistant") == 0
    assert json.loads(capsys.readouterr().out)["text"].split() == last
    assert chat(copy, monkeypatch, "a " * 15 + "\n") == 2
    assert "message: found 17 tokens with the chat template" in error_line(capsys)
    monkeypatch.setattr("sys.stdin", Terminal("a " * 15 + "\nthe\n"))
    assert main(["chat", "--model", str(copy), "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert "expected less than the 16 of the context; the message is left out" in captured.err
    assert len(captured.out.replace("> ", "").split()) == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def readline(self, *_: object) -> str:
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.mark.filterwarnings("ignore:.*max_position_embeddings")
@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_stops_the_answer_on_a_terminal(directory, tmp_path, capsys, monkeypatch, terminal):
    copy = copy_of(directory, tmp_path)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    seen = []
    encode, tokens = chat_command.encode, chat_command.new_tokens
    monkeypatch.setattr(
        chat_command,
        "encode",
        lambda t, text, *a, **k: seen.append(text) or encode(t, text, *a, **k),
    )

    def interrupted(*arguments, **more):
        for count, token in enumerate(tokens(*arguments, **more)):
            if len(seen) == 1 and count == 2:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(chat_command, "new_tokens", interrupted)
    lines = "the capital\nand a\n^C\nb\n"
    monkeypatch.setattr("sys.stdin", Terminal(lines) if terminal else io.StringIO(lines))
    assert main(["chat", "--model", str(copy), "--max-new-tokens", "4"]) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "interrupted"
    first, *more = out.replace("> ", "").splitlines()
    assert len(first.split()) == 2
    if terminal:  # what was said is part of the conversation, which goes on
        assert seen[1] == f"user the capital assistant {first} user and a "
        assert more[0].strip()
    assert len(seen) == (2 if terminal else 1)


def test_chat_without_a_template(directory, capsys, monkeypatch):
    assert chat(directory, monkeypatch, "hi\n") == 2
    assert "no chat template" in error_line(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "-1"), "--temperature: found -1.0, expected a number of at least 0"),
        (("--top-p", "0"), "--top-p: found 0.0, expected a number in (0, 1]"),
        (("--top-p", "1.5"), "--top-p: found 1.5, expected a number in (0, 1]"),
        (("--stop-id", "99"), "--stop-id: found 99, expected an integer from 0 to 12"),
    ],
)
def test_a_flag_out_of_range(directory, capsys, flags, message):
    assert generate(directory, "--json", *flags) == 2
    assert message in error_line(capsys)


def test_a_meta_checkpoint_names_the_converter(tmp_path, capsys):
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    assert generate(tmp_path) == 2
    assert f"python -m convert {tmp_path} DIR" in error_line(capsys)


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


def test_info_lists_the_presets(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out.split() == list(PRESETS)


def test_info_of_neither(capsys):
    assert main(["info", "llama-9"]) == 2
    assert "neither a directory nor a preset, expected one of llama-7b" in error_line(capsys)


@pytest.mark.parametrize("value", ["0", "-3", "x"])
def test_a_count_that_is_none(directory, capsys, value):
    assert generate(directory, "--max-new-tokens", value) == 2
    assert f"--max-new-tokens: found {value!r}, expected a positive" in error_line(capsys)


@pytest.mark.parametrize(
    "arguments", [[], ["chatter"], ["chat"], ["mask"], ["generate", "--model", "x"]]
)
def test_arguments_that_make_no_command(capsys, arguments):
    assert main(arguments) == 2
    assert re.search(r"; see python -m llama_jax( \w+)? --help\n$", error_line(capsys))


def test_a_name_is_shown_on_one_line(directory, tmp_path, capsys):
    out = tmp_path / "a\nb\x1b[31m"
    assert main(["quantize", "--model", str(directory), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path}/a\\nb\\x1b[31m: ")
    assert shown.count("\n") == 2  # and how many matrices have 8 bits
    assert out.is_dir()


def test_a_value_of_two_dashes():
    parser = Parser()
    parser.add_argument("--stop", action="append")
    parser.add_argument("--text", type=some_text, nargs="+", action="extend")
    options = parser.parse_args(["--stop=--", "--stop", "x", "--text=--", "--text", "a", "b"])
    assert (options.stop, options.text) == (["--", "x"], ["--", "a", "b"])
    with pytest.raises(ValueError, match="--stop: expected one argument"):
        parser.parse_args(["--stop", "--"])


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
