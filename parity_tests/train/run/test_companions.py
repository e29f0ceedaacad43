"""Special tokens and the files beside the weights, through training, export and conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
from llama_jax.__main__ import main as library
from llama_jax.evaluation.scoring import loglikelihood_rolling
from llama_jax.load import load_model
from llama_jax.text.companions import companion_files, copy_companions
from parity_tests.harness.tiny_tokenizers import CORPUS
from parity_tests.train.runs import CONFIG, Tiny, run_flags
from train.__main__ import main
from train.data.token_shards import read_index
from train.data.tokenize import tokenize

VOCAB = 320


class Trained(NamedTuple):
    """A tokenizer, text tokenized with it, a run on that, and the run's export."""

    tokenizer: Path
    data: Path
    run: Path
    export: Path


def bpe(directory: Path, *, bos: bool) -> Path:
    """A bare tokenizer.json: a byte-level BPE that puts `<s>` before a text, or has no `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", *(["<s>"] if bos else []), "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def flags(tiny: Tiny, out: Path, data: Path, **changes: Any) -> list[str]:
    defaults = {"steps": 1, "optimizer__warmup_steps": 0, "evaluation__every": 0}
    return run_flags(tiny, out, data=data, **(defaults | changes))


def make_trained(home: Path, tiny: Tiny, *, bos: bool) -> Trained:
    source = home / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    tokenizer = bpe(home / "tokenizer", bos=bos)
    data = home / "data"
    tokenize([source], tokenizer, data, validation_fraction=0)
    config = home / "config.json"
    # the config has other special tokens; those of the data take precedence
    config.write_text(
        json.dumps(CONFIG | {"vocab_size": VOCAB, "bos_token_id": 9, "eos_token_id": 8})
    )
    assert main(flags(tiny, home / "run", data, model__config=config)) == 0
    assert main(["export", str(home / "run"), str(home / "hf")]) == 0
    return Trained(tokenizer, data, home / "run", home / "hf")


@pytest.fixture(scope="module")
def with_bos(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"), tiny, bos=True)


@pytest.fixture(scope="module")
def without_bos(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"), tiny, bos=False)


@pytest.fixture(params=["with_bos", "without_bos"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return request.getfixturevalue(request.param)


def test_special_tokens_agree_from_text_to_export(trained: Trained) -> None:
    """The beginning token is what the tokenizer puts before a text; without one, the end token."""
    plain = Tokenizer.from_file(str(trained.tokenizer / "tokenizer.json"))
    added = plain.encode("a").ids[0] if plain.token_to_id("<s>") is not None else None
    index = read_index(trained.data)
    assert (index.bos_id, index.eos_id) == (added, plain.token_to_id("<|endoftext|>"))
    theirs = AutoTokenizer.from_pretrained(trained.export)
    expected = index.eos_id if added is None else added
    for directory in (trained.run, trained.export):
        config = json.loads((directory / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (expected, index.eos_id)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (expected, index.eos_id)
    for text in CORPUS[:6]:
        assert theirs(text)["input_ids"] == plain.encode(text).ids


def test_transformers_generates_from_an_export(trained: Trained) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.export)
    tokenizer = AutoTokenizer.from_pretrained(trained.export)
    generation, config = model.generation_config, model.config
    assert (generation.bos_token_id, generation.eos_token_id) == (
        config.bos_token_id,
        config.eos_token_id,
    )
    ids = tokenizer("the other", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    ours = load_model(trained.export).generate(ids["input_ids"].numpy(), max_new_tokens=4)
    assert np.asarray(ours).tolist() == out.tolist()


def test_rolling_scores_begin_with_the_tokenizers_bos(trained: Trained) -> None:
    """As in lm-evaluation-harness the prefix is the tokenizer's bos, else its eos; also from a run."""
    tokenizer = AutoTokenizer.from_pretrained(trained.export)
    model = AutoModelForCausalLM.from_pretrained(trained.export)
    prefix = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    ids = tokenizer("the weather", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[prefix, *ids[:-1]]])).logits[0]
    expected = torch.log_softmax(logits, -1)[range(len(ids)), ids].sum().item()
    for directory in (trained.run, trained.export):
        (scored,) = loglikelihood_rolling(load_model(directory), [ids])
        np.testing.assert_allclose(scored.total, expected, rtol=1e-5)


GENERATION = {"do_sample": True, "eos_token_id": [0, 2], "temperature": 0.6, "top_p": 0.9}
FILES = {
    "generation_config.json": json.dumps(GENERATION),
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
    "added_tokens.json": "{}",
}


@pytest.fixture(scope="module")
def begun(with_bos: Trained, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from a checkpoint with all companion files, on data of a bare tokenizer.json."""
    home = tmp_path_factory.mktemp("begun")
    start = Path(shutil.copytree(with_bos.export, home / "start"))
    for name, content in FILES.items():
        (start / name).parent.mkdir(exist_ok=True)
        (start / name).write_text(content)
    assert main(flags(tiny, home / "run", with_bos.data, model__init_from=start)) == 0
    return home / "run"


def contents(directory: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in companion_files(directory).items()}


def test_a_run_passes_on_the_files_it_began_with(begun: Path, tmp_path: Path) -> None:
    expected = contents(begun.parent / "start")
    assert expected.keys() >= {*FILES, "tokenizer.json", "tokenizer_config.json"}
    assert contents(begun) == expected
    assert load_model(begun).generation_config.eos_token_ids == (0, 2)
    assert main(["export", str(begun), str(tmp_path / "hf")]) == 0
    for to in ("hf", "orbax"):
        convert.convert(begun, tmp_path / f"to-{to}", to=to)
    convert.convert(tmp_path / "to-orbax", tmp_path / "again")
    quantize = ["quantize", "--model", str(begun), "--out", str(tmp_path / "quantized")]
    assert library(quantize) == 0
    for name in ("hf", "to-hf", "to-orbax", "again", "quantized"):
        files = contents(tmp_path / name)
        generation = json.loads(files.pop("generation_config.json"))
        assert generation | GENERATION == generation
        assert files == {k: v for k, v in expected.items() if k != "generation_config.json"}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert (theirs.eos_token_id, theirs.do_sample, theirs.top_p) == ([0, 2], True, 0.9)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(
        [{"role": "user", "content": "the"}], tokenize=False
    ) == "the<|end|>"  # fmt: skip


def test_a_gguf_of_a_run_keeps_its_generation_config(begun: Path, tmp_path: Path) -> None:
    convert.convert(begun, tmp_path / "a.gguf")
    convert.convert(tmp_path / "a.gguf", tmp_path / "back")
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert {*GENERATION["eos_token_id"]} <= {*np.atleast_1d(generation["eos_token_id"]).tolist()}
    assert generation["temperature"] == pytest.approx(0.6)
    assert generation["top_p"] == pytest.approx(0.9)


def test_companions_of_another_model_are_removed(tmp_path: Path) -> None:
    """They would be taken for those of the new model; other files are left alone."""
    old, new = tmp_path / "old", tmp_path / "new"
    for directory, names in ((old, [*FILES, "notes.md"]), (new, ["tokenizer.json"])):
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(name)
    assert copy_companions(new, old) == ["tokenizer.json"]
    assert contents(old) == {"tokenizer.json": b"tokenizer.json"}
    assert (old / "notes.md").exists()


def test_weights_that_do_not_fit_are_refused_before_there_is_a_run(
    with_bos: Trained, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = Path(shutil.copytree(with_bos.export, tmp_path / "start"))
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    capfd.readouterr()
    assert main(flags(tiny, tmp_path / "run", with_bos.data, model__init_from=start)) == 2
    assert "mlp.up_proj.weight: found shape [48, 32], expected [40, 32]" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_warning_if_data_and_checkpoint_end_texts_differently(
    with_bos: Trained, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = Path(shutil.copytree(with_bos.export, tmp_path / "start"))
    (start / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert main(flags(tiny, tmp_path / "run", with_bos.data, model__init_from=start)) == 0
    assert (
        f"the data ends its documents with token 0, but generation from {start} stops at 2: "
        in (capfd.readouterr().err)
    )
