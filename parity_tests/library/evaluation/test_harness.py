"""The model class of lm-evaluation-harness beside lm_eval's own for PyTorch, on tasks made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from parity_tests.harness.child_process import ROOT

pytest.importorskip("lm_eval", reason="lm_eval (extra eval) is not installed")

pytestmark = pytest.mark.filterwarnings("default")  # lm_eval's and datasets' own

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "while", "seven", "dogs", "ran", "far", "away", "from", "their",
    "house",
]  # fmt: skip
CONTEXT = 64


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def save_checkpoint(directory: Path, bos: bool = True, **options: Any) -> Path:
    """A random model with a byte-level BPE that puts <s> before a text."""
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(rng, 20) for _ in range(50)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(fields | options)))
    model.generation_config.pad_token_id = 1
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def save_tasks(folder: Path, documents: int = 12) -> Path:
    """Tasks of every kind, whose documents are JSON beside them."""
    rng = np.random.default_rng(1)
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(documents):
        context = sentence(rng, int(rng.integers(2, 25)))
        choices = [sentence(rng, int(rng.integers(1, 4))) for _ in range(4)]
        label, text = int(rng.integers(4)), sentence(rng, int(rng.integers(3, 120)))
        lines.append({"context": context, "choices": choices, "label": label, "text": text})
        if number == 0:
            lines[-1]["context"] = ""
    (folder / "documents.json").write_text("\n".join(map(json.dumps, lines)))
    data = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "documents.json"}}}}}
test_split: test
num_fewshot: 0
"""
    (folder / "choices.yaml").write_text(
        f"""task: local_choices
{data}
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    (folder / "rolling.yaml").write_text(
        f"""task: local_rolling
{data}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
    )
    (folder / "generation.yaml").write_text(
        f"""task: local_generation
{data}
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: [" the", "x y"], max_gen_toks: 20}}
metric_list: [{{metric: exact_match}}]
"""
    )
    return folder


TASKS = ["local_choices", "local_rolling", "local_generation"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def responses(model: str, checkpoint: Path, folder: Path, **arguments: Any) -> dict[str, list[Any]]:
    """What a model class answers to every request of the tasks, by task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import llama_jax.evaluation.harness  # noqa: F401 - registers the class

    os.environ["HF_DATASETS_OFFLINE"] = "1"
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(checkpoint), "dtype": "float32", **arguments},
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    assert results is not None
    return {
        task: [(sample["doc_id"], sample["resps"]) for sample in results["samples"][task]]
        for task in TASKS
    }


def after_prefix(checkpoint: Path) -> str:
    """What transformers answers to <s> alone, up to the stop strings of local_generation."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    ids = model.generate(torch.tensor([[0]]), max_new_tokens=20, do_sample=False)[0, 1:]
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return text.split(" the")[0].split("x y")[0]


@pytest.mark.parametrize("bos", [True, False])
def test_answers_are_those_of_pytorch(tmp_path: Path, bos: bool) -> None:
    """Contexts that are empty, too long and of many continuations; texts of several windows; stops."""
    checkpoint = save_checkpoint(tmp_path / "model", bos=bos)
    folder = save_tasks(tmp_path / "tasks")
    ours = responses("llama_jax", checkpoint, folder)
    theirs = responses("hf", checkpoint, folder)
    for task in TASKS:
        assert [number for number, _ in ours[task]] == [number for number, _ in theirs[task]]
    pairs = [
        zip(a, b, strict=True)
        for (_, a), (_, b) in zip(ours["local_choices"], theirs["local_choices"], strict=True)
    ]
    compared = 0
    for choices in pairs:
        for (one,), (other,) in choices:
            assert abs(float(one[0]) - float(other[0])) < 1e-4
            assert bool(one[1]) == bool(other[1])
            compared += 1
    assert compared == 48
    for (_, one), (_, other) in zip(ours["local_rolling"], theirs["local_rolling"], strict=True):
        np.testing.assert_allclose(float(one[0][0]), float(other[0][0]), rtol=1e-5)
    if not bos:  # lm_eval gives an empty context no token at all, and the answer is that of padding
        theirs["local_generation"][0] = (0, [[after_prefix(checkpoint)]])
    assert ours["local_generation"] == theirs["local_generation"]
    texts = [answer[0][0] for _, answer in ours["local_generation"]]
    assert len(set(map(len, texts))) > 3
    assert not any(" the" in text for text in texts)


def test_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    folder = save_tasks(tmp_path / "tasks", 2)
    command = [sys.executable, "-m", "llama_jax.evaluation.harness", "run", "--model", "llama_jax"]
    command += [
        "--model_args",
        f"pretrained={checkpoint},max_length=32",
        "--tasks",
        "local_choices",
    ]
    command += ["--include_path", str(folder), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "local_choices" in done.stdout
    command[command.index("--model_args") + 1] = f"pretrained={tmp_path / 'none'}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "no such directory" in done.stderr.splitlines()[-1]


def test_widths_take_the_least_time() -> None:
    """Beside every way of cutting the batches into groups of one width."""
    from llama_jax.evaluation.harness import few_widths

    rng = np.random.default_rng(0)
    for _ in range(50):
        longest = sorted(map(int, rng.integers(1, 200, rng.integers(1, 8))), reverse=True)
        compilation = float(rng.integers(0, 300))
        costs = []
        for cuts in range(1 << (len(longest) - 1)):
            width, cost = longest[0], compilation
            for index, least in enumerate(longest):
                if index and cuts >> (index - 1) & 1:
                    width, cost = least, cost + compilation
                cost += width
            costs.append(cost)
        widths = few_widths(longest, compilation)
        assert all(width >= least for width, least in zip(widths, longest, strict=True))
        assert sum(widths) + compilation * len(set(widths)) <= min(costs)


def test_few_programs_are_compiled(tmp_path: Path) -> None:
    """For prompts of any length: one that decodes, and one for each width."""
    from llama_jax.evaluation.harness import HarnessModel
    from llama_jax.generation import loop

    model = HarnessModel(str(save_checkpoint(tmp_path, max_position_embeddings=512)), batch_size=4)
    rng = np.random.default_rng(0)
    contexts = [rng.integers(2, 300, n).tolist() for n in range(200, 2, -18)]
    before = loop._prefill._cache_size(), loop._decode._cache_size()
    texts = model._generate(contexts, {"max_gen_toks": 4})
    after = loop._prefill._cache_size(), loop._decode._cache_size()
    assert len(texts) == len(contexts)
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)


def test_arguments(checkpoint: Path) -> None:
    from llama_jax.evaluation.harness import HarnessModel

    for arguments, message in (
        ({"max_length": 65}, "max_length: found 65, expected 1 to 64"),
        ({"batch_size": 0}, "batch_size: found 0, expected a positive number"),
        ({"dtype": "int8"}, "dtype: found .*int8"),
    ):
        with pytest.raises(ValueError, match=message):
            HarnessModel(str(checkpoint), **arguments)  # type: ignore[arg-type]
