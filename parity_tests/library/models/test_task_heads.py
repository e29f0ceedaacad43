"""The task heads: the algorithm in float64, the rounding in float32, as in `test_model.py`.

The oracle's heads are held to Hugging Face's over the same cases.
"""

import dataclasses
from collections import defaultdict
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

import llama_jax
from llama_jax import (
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from parity_tests.harness.cases import BASE, Config, Inputs, hf_model, inputs_of, weights_of
from parity_tests.harness.programs import (
    compiled,
    hf_numbers,
    oracle_numbers,
    our_inputs,
    our_model,
    our_numbers,
)
from parity_tests.reference import heads
from parity_tests.reference.errors import relative_error, rms_error, worst
from parity_tests.reference.oracle import IGNORE
from parity_tests.reference.tolerances import FLOAT64_BAR, ROUNDING_RATIO

# Hugging Face's float32 rounding through the layers, against the oracle in float64
BAR = 1e-5

CLASSES = {
    "sequence": "LlamaForSequenceClassification",
    "token": "LlamaForTokenClassification",
    "question": "LlamaForQuestionAnswering",
}
ORACLES = {
    "sequence": heads.sequence_classification,
    "token": heads.token_classification,
    "question": heads.question_answering,
}
PAD = 3


@dataclasses.dataclass(frozen=True)
class HeadCase:
    """A task, its labels by name (`labels_of`), a config and inputs."""

    name: str
    task: Literal["sequence", "token", "question"]
    labels: str | None
    config: Config
    inputs: Inputs

    def __repr__(self) -> str:
        return f"{self.task}_{self.name}"

    @property
    def hf_class(self) -> Any:
        return getattr(transformers, CLASSES[self.task])

    @property
    def our_class(self) -> Any:
        return getattr(llama_jax, CLASSES[self.task])


def head_case(
    task: Any, name: str, labels: str | None, inputs: Inputs | None = None, **changes: Any
) -> HeadCase:
    """One layer and five labels unless said otherwise, and a padding token."""
    config = BASE | {"num_hidden_layers": 1, "pad_token_id": PAD, "num_labels": 5} | changes
    return HeadCase(name, task, labels, config, inputs or Inputs(batch=4))


LEFT, RIGHT = Inputs(batch=4, mask="left"), Inputs(batch=4, mask="right")
REGRESSION = {"problem_type": "regression"}
MULTI = {"problem_type": "multi_label_classification"}
CASES = [
    head_case("sequence", "right", "classes", RIGHT),
    head_case("sequence", "left", "classes", LEFT),
    head_case("sequence", "holes", "classes", Inputs(batch=4, mask="holes")),
    head_case("sequence", "unpadded", "classes"),
    head_case("sequence", "no_labels", None, RIGHT),
    head_case("sequence", "only_padding", "classes", Inputs(batch=2, length=1), vocab_size=PAD + 1),
    head_case("sequence", "no_padding_token", "classes", Inputs(batch=1), pad_token_id=None),
    head_case("sequence", "padding_token_negative", "classes", RIGHT, pad_token_id=-1),
    head_case("sequence", "embeds", "classes", Inputs(batch=4, embeds=True, mask="left")),
    head_case("sequence", "column", "classes_column", RIGHT),
    head_case("sequence", "some_ignored", "classes_some", RIGHT),
    head_case("sequence", "all_ignored", "classes_none", RIGHT),
    head_case("sequence", "one_number", "number", RIGHT, num_labels=1),
    head_case("sequence", "one_number_column", "numbers", LEFT, num_labels=1),
    head_case("sequence", "one_number_batch_1", "number", Inputs(batch=1), num_labels=1),
    head_case("sequence", "one_whole_number", "classes", RIGHT, num_labels=1),
    head_case("sequence", "numbers", "numbers", RIGHT, **REGRESSION),
    head_case("sequence", "several", "several", LEFT),
    head_case("sequence", "several_named", "several", RIGHT, num_labels=2, **MULTI),
    head_case("sequence", "several_of_one", "several", RIGHT, num_labels=1, **MULTI),
    head_case("token", "right", "tokens", RIGHT),
    head_case("token", "left", "tokens", LEFT, attention_bias=True),
    head_case("token", "embeds", "tokens", Inputs(embeds=True)),
    head_case("token", "two_labels", "tokens", num_labels=2),
    head_case("token", "all_ignored", "tokens_none"),
    head_case("token", "no_labels", None, RIGHT),
    head_case("question", "right", "inside", RIGHT),
    head_case("question", "left", "inside", LEFT, mlp_bias=True),
    head_case("question", "outside", "outside"),
    head_case("question", "column", "inside_column", RIGHT),
    head_case("question", "all_outside", "all_outside"),
    head_case("question", "embeds", "inside", Inputs(embeds=True)),
    head_case("question", "no_labels", None, RIGHT),
]
BY_NAME = {repr(case): case for case in CASES}


def labels_of(case: HeadCase, rng: np.random.Generator) -> dict[str, np.ndarray]:
    batch, length, count = case.inputs.batch, case.inputs.length, case.config["num_labels"]
    kind = case.labels
    if kind is None:
        return {}
    if case.task == "question":
        low, high = (-4, length + 4) if kind == "outside" else (0, length)
        low, high = (length, length + 9) if kind == "all_outside" else (low, high)
        shape = (batch, 1) if kind == "inside_column" else (batch,)
        return {n: rng.integers(low, high, shape) for n in ("start_positions", "end_positions")}
    if kind.startswith("tokens"):
        labels = rng.integers(0, count, (batch, length))
        ignored = 1.0 if kind == "tokens_none" else 0.3
        return {"labels": np.where(rng.random((batch, length)) < ignored, IGNORE, labels)}
    if kind == "number":
        return {"labels": rng.normal(size=batch).astype(np.float32)}
    if kind == "numbers":
        return {"labels": rng.normal(size=(batch, count)).astype(np.float32)}
    if kind == "several":
        return {"labels": rng.integers(0, 2, (batch, count)).astype(np.float32)}
    classes = rng.integers(0, count, (batch, 1) if kind == "classes_column" else batch)
    if kind == "classes_some":
        classes[0] = IGNORE
    if kind == "classes_none":
        classes[:] = IGNORE
    return {"labels": classes}


def head_inputs(case: HeadCase, seed: int = 0) -> dict[str, Any]:
    """As `inputs_of`, with the padding token where the mask has none and labels of the task."""
    made = inputs_of(dataclasses.replace(case.inputs, labels=None), case.config, seed)
    if "input_ids" in made and "attention_mask" in made and case.config["pad_token_id"] is not None:
        pad = case.config["pad_token_id"] % case.config["vocab_size"]
        made["input_ids"] = np.where(made["attention_mask"] == 0, pad, made["input_ids"])
    if case.name == "only_padding":
        made["input_ids"] = np.full_like(made["input_ids"], PAD)
    return made | labels_of(case, np.random.default_rng([seed, 2]))


def truth(case: HeadCase, weights: Any, inputs: Any) -> dict[str, np.ndarray]:
    return oracle_numbers(case.config, weights, inputs, program=ORACLES[case.task])


def hf(case: HeadCase, weights: Any) -> Any:
    return hf_model(case.config, weights, model_class=case.hf_class)


def bias_beside_weight(numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A bias of every position's score moves no probability: its gradient is zero but for rounding, and
    has a scale only together with the weight's."""
    if "grad qa_outputs.bias" not in numbers:
        return numbers
    numbers = dict(numbers)
    bias = numbers.pop("grad qa_outputs.bias")
    weight = numbers.pop("grad qa_outputs.weight")
    return numbers | {"grad qa_outputs": np.concatenate([weight, bias[:, None]], axis=1)}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_oracle_is_hugging_face(case: HeadCase) -> None:
    weights, inputs = weights_of(case.config, model_class=case.hf_class), head_inputs(case)
    got, want = truth(case, weights, inputs), hf_numbers(hf(case, weights), inputs)
    if case.labels in ("classes_none", "tokens_none", "all_outside"):
        assert np.isnan(want["loss"])  # torch divides zero by zero
        assert got["loss"] == 0
        assert relative_error(got["logits"], want["logits"]) <= BAR
        return
    ours, theirs = bias_beside_weight(got), bias_beside_weight(want)
    largest = max(np.abs(value).max() for name, value in theirs.items() if name.startswith("grad"))
    for name in [name for name in ours if name.startswith("grad") and not np.any(ours[name])]:
        # of a single key; on some processors torch leaves rounding
        del ours[name]
        assert np.abs(theirs.pop(name)).max() <= BAR * largest, name
    error, name = worst(ours, theirs)
    assert error <= BAR, f"{name}: {error:.2e}"


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_float64_equals_the_oracle(case: HeadCase, record_property: Any) -> None:
    weights, inputs = weights_of(case.config, model_class=case.hf_class), head_inputs(case)
    want = truth(case, weights, inputs)
    with jax.enable_x64(True):
        model = our_model(case.config, weights, jnp.float64, case.our_class)
        got = our_numbers(model, inputs)
    assert {value.dtype for value in got.values()} == {np.dtype("float64")}
    error, name = worst(bias_beside_weight(got), bias_beside_weight(want))
    record_property("float64_error", error)
    assert error <= FLOAT64_BAR, f"{name}: relative error {error:.2e}"


# one of each loss; 80 runs of each, as in test_model.py
ROUNDING = (
    "sequence_right",
    "sequence_numbers",
    "sequence_several",
    "token_left",
    "question_right",
)


@pytest.mark.parametrize("name", ROUNDING)
def test_float32_is_as_exact_as_hugging_face(name: str) -> None:
    case = BY_NAME[name]
    ours, theirs, exact = defaultdict(list), defaultdict(list), defaultdict(list)
    run = compiled(our_inputs(head_inputs(case), jnp.float32)[1])
    for seed in range(8):
        weights = weights_of(case.config, seed, case.hf_class)
        model = our_model(case.config, weights, jnp.float32, case.our_class)
        reference = hf(case, weights)
        for draw in range(10 * seed, 10 * seed + 10):
            inputs = head_inputs(case, draw)
            for pool, numbers in (
                (ours, our_numbers(model, inputs, run)),
                (theirs, hf_numbers(reference, inputs)),
                (exact, truth(case, weights, inputs)),
            ):
                for number, value in bias_beside_weight(numbers).items():
                    pool[number].append(value)
    errors = {n: (rms_error(ours[n], exact[n]), rms_error(theirs[n], exact[n])) for n in exact}
    print(f"\n{name}: rms error against float64, ours and Hugging Face's, both float32")
    for number, (our_error, hf_error) in errors.items():
        print(f"  {number:56s} {our_error:.3e} {hf_error:.3e}  x {our_error / hf_error:.2f}")
    for number, (our_error, hf_error) in errors.items():
        assert our_error <= ROUNDING_RATIO * hf_error, (
            f"{number}: {our_error:.3e}, Hugging Face {hf_error:.3e}"
        )


# Mistakes ----------------------------------------------------------------------------------------

TINY = LlamaConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    pad_token_id=0,
    num_labels=3,
)
IDS = np.ones((2, 4), np.int32)


def tiny(model_class: Any, **changes: Any) -> Any:
    return model_class(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("changes", "labels", "message"),
    [
        (
            {"pad_token_id": None},
            None,
            "pad_token_id: null in the config, but a batch of 2 needs one",
        ),
        ({}, np.array([0, 3]), "labels: found 3, expected -100 or 0 to 2"),
        ({}, np.array([0, 1, 2]), "labels: found int64[3], expected integers [2]"),
        ({}, np.zeros((2, 3), int), "labels: found int64[2, 3], expected integers [2]"),
        ({}, np.zeros(2), "labels: found float64[2], expected floats [2, 3] for multi_label"),
        (
            MULTI,
            np.zeros((2, 3), int),
            "labels: found int64[2, 3], expected floats [2, 3] for multi",
        ),
        (
            REGRESSION,
            np.zeros(2),
            "labels: found float64[2], expected numbers [2, 3] for regression",
        ),
        (REGRESSION, np.zeros((2, 3), bool), "labels: found bool[2, 3], expected numbers [2, 3]"),
        (
            {"problem_type": "ranking"},
            np.array([0, 1]),
            "problem_type: found 'ranking', expected null or one of regression, single_label",
        ),
        ({"num_labels": 0}, None, "num_labels: found 0, expected at least one label"),
    ],
)
def test_bad_sequence_labels(changes: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny(LlamaForSequenceClassification, **changes)(IDS, labels=labels)
    assert message in str(caught.value)


def test_hugging_face_refuses_the_same_batch() -> None:
    case = head_case("sequence", "batch", None, pad_token_id=None)
    model = hf(case, weights_of(case.config, model_class=case.hf_class))
    with pytest.raises(ValueError, match="no padding token"):
        hf_numbers(model, head_inputs(case))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([[0, 3, 1, 1]] * 2), "labels: found 3, expected -100 or 0 to 2"),
        (np.array([0, 1]), "labels: found int64[2], expected integers [2, 4]"),
        (np.zeros((2, 4)), "labels: found float64[2, 4], expected integers [2, 4]"),
    ],
)
def test_bad_token_labels(labels: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny(LlamaForTokenClassification)(IDS, labels=labels)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (np.array([1, 2]), None, "pass both start_positions and end_positions"),
        (np.zeros((2, 4), int), np.array([1, 2]), "start_positions: found int64[2, 4], expected"),
        (
            np.array([1, 2]),
            np.array([0.5, 1]),
            "end_positions: found float64[2], expected integers",
        ),
    ],
)
def test_bad_positions(start: Any, end: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny(LlamaForQuestionAnswering)(IDS, start_positions=start, end_positions=end)
    assert message in str(caught.value)


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(
        ValueError, match=r"attention_mask: found shape \(2, 3\), expected \(2, 4\)"
    ):
        tiny(LlamaForSequenceClassification)(IDS, attention_mask=np.ones((2, 3)))


@pytest.mark.parametrize("label", [3, -1])
def test_a_class_out_of_range_is_nan_under_jit(label: int) -> None:
    model = tiny(LlamaForSequenceClassification)
    loss = jax.jit(lambda model, labels: model(IDS, labels=labels).loss)
    assert np.isnan(loss(model, jnp.array([1, label])))
    assert np.isfinite(loss(model, jnp.array([1, -100])))


def test_dropout_before_the_token_head() -> None:
    """A share of the hidden states is zeroed, the others scaled up; without a key, nothing is."""
    model = tiny(LlamaForTokenClassification, classifier_dropout=0.5)
    weight = jnp.zeros_like(model.score.weight[...]).at[:, 0].set(1.0)  # reads one hidden number
    model.score.weight[...] = weight
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    plain, dropped = (model(ids, dropout_key=key).logits for key in (None, jax.random.key(0)))
    ratio = np.asarray(dropped / plain).round(4)
    assert set(ratio.flat) == {0.0, 2.0}
    everything = tiny(LlamaForTokenClassification, classifier_dropout=1.0)
    assert not everything(ids, dropout_key=jax.random.key(0)).logits.any()


def test_requested_outputs_are_returned() -> None:
    out = tiny(LlamaForQuestionAnswering)(IDS, output_hidden_states=True, output_attentions=True)
    assert out.loss is None
    assert len(out.hidden_states) == 2
    assert out.attentions[0].shape == (2, 2, 4, 4)
