"""The examples run, on small inputs."""

import importlib.util
from types import ModuleType

import jax
import pytest
from flax import nnx

from llama_jax import PRESETS, LlamaConfig, LlamaForCausalLM
from parity_tests.harness.child_process import ROOT
from train.data.stdlib import VOCAB_SIZE
from train.option_checks import validate

FOLDER = ROOT / "examples"
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the old bear\n"


@pytest.fixture(autouse=True)
def default_promotion():
    """The strict settings of the suite are not meant for users' programs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_short():
    for file in FOLDER.glob("*.py"):
        assert len(file.read_text().splitlines()) < 100, file.name


def test_quickstart(tmp_path):
    LlamaForCausalLM(PRESETS["tiny-4m"], rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    assert load("quickstart").main(str(tmp_path)) < 1e-5


def test_fused_loss_in_your_jax_program():
    first, last = load("fused_loss_in_your_jax_program").main()
    assert first > 5
    assert last < 3


def test_your_own_training_loop():
    first, last = load("your_own_training_loop").main()
    assert last < first - 1


def test_pretrain_then_continue_then_score(tmp_path):
    """Each example reads what the one before wrote."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"{number} " + TEXT * 30)
    small = ["--steps=2", "--batch-size=2", "--sequence-length=32", "--evaluation.every=0"]
    sources = [str(texts / "*.txt")]
    assert load("pretrain_on_your_text").main(tmp_path / "a", sources, *small) == 0
    model = tmp_path / "a" / "model"
    assert load("continue_from_checkpoint").main(model, tmp_path / "b", sources, *small) == 0
    scores, texts = load("score_and_generate").main(str(tmp_path / "b" / "model"), 4)
    assert len(scores) == len(texts) == 3
    assert all(score < 0 for score in scores)


def test_the_run_of_the_demo() -> None:
    demo = load("demo/pretrain")
    options = demo.demo_options()
    validate(options)
    assert options.model.config is not None
    assert LlamaConfig.from_pretrained(options.model.config.parent).vocab_size == VOCAB_SIZE
    # there is a checkpoint to resume from, and something left to do
    assert options.checkpoint.every < demo.KILLED_AFTER < options.steps - options.checkpoint.every


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("x = 1\nif x:\n    y = 2\n    z = (", 3),
        ("def f(x):\n    return (x,\n            1)\n", 3),
        ("x = 1\n  y", 1),
        ("x = 1\n\n\n)", 3),
        ("pattern = '\\d'  # a warning, not an error", 1),
        ("class ", 0),
        ("x\0", 0),
        ("", 0),
    ],
)
def test_lines_that_python_parses(text: str, lines: int) -> None:
    assert load("demo/pretrain").parsed_lines(text) == lines
