"""Weights and label names of the task models and the bare decoder, in and out, as transformers does it."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

import llama_jax
from llama_jax import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from llama_jax.checkpoints.huggingface import to_hf_tensors
from llama_jax.checkpoints.names import name_table
from parity_tests.harness.cases import BASE, hf_config, hf_model, weights_of, write_hf_directory
from parity_tests.harness.child_process import output_lines
from parity_tests.reference.errors import relative_error

HEADS = (
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaForQuestionAnswering,
)
CONFIG = BASE | {"num_hidden_layers": 1, "pad_token_id": 0}
NAMES = {"0": "no", "1": "perhaps", "2": "yes"}
NAMED = CONFIG | {"id2label": NAMES, "label2id": {name: int(n) for n, name in NAMES.items()}}


def hf_directory(path: Path, model_class: Any, config: dict[str, Any] = NAMED) -> Path:
    """What transformers' class of the same name writes, with random weights."""
    theirs = getattr(transformers, model_class.__name__)
    weights = weights_of(config, model_class=theirs)
    hf_model(config, weights, model_class=theirs).save_pretrained(path)
    return path


def decoder_of(model: Any) -> dict[str, np.ndarray]:
    """The decoder's tensors without their prefix."""
    heads = ("lm_head.", "score.", "qa_outputs.")
    return {
        name.removeprefix("model.").removeprefix("transformer."): value
        for name, value in to_hf_tensors(model)
        if not name.startswith(heads)
    }


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model_class", [LlamaModel, *HEADS])
def test_a_hugging_face_directory_round_trips(tmp_path: Path, model_class: Any) -> None:
    source = hf_directory(tmp_path / "hf", model_class)
    model = model_class.from_pretrained(source)
    model.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "ours"))
    assert before.keys() == after.keys() == name_table(model).keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    theirs = getattr(transformers, model_class.__name__)
    again, report = theirs.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.id2label == {int(n): name for n, name in NAMES.items()}
    assert again.config.label2id == NAMED["label2id"]
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == [model_class.__name__]
    ids = np.array([[7, 8, 9, 0], [5, 6, 0, 0]])
    got, want = model(ids.astype(np.int32)), again(torch.from_numpy(ids))
    for field in ("last_hidden_state", "logits", "start_logits", "end_logits"):
        if hasattr(got, field):
            assert relative_error(getattr(got, field), getattr(want, field)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_class", HEADS)
def test_a_causal_checkpoint_gets_a_new_head(tmp_path: Path, model_class: Any, tied: bool) -> None:
    config = CONFIG | {"tie_word_embeddings": tied, "initializer_range": 0.5}
    source = write_hf_directory(tmp_path / "causal", config, weights_of(config))
    with pytest.warns(
        UserWarning, match=r"randomly initialized .*(score|qa_outputs)\.weight"
    ) as caught:
        model = model_class.from_pretrained(source)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert same(decoder_of(model), decoder_of(LlamaForCausalLM.from_pretrained(source)))
    head = getattr(model, "score", None) or model.qa_outputs
    assert head.weight.shape == (2, CONFIG["hidden_size"])
    assert 0.3 < np.std(np.asarray(head.weight[...])) < 0.7
    assert not hasattr(head, "bias") or not np.asarray(head.bias[...]).any()

    def drawn(seed: int) -> np.ndarray:
        with pytest.warns(UserWarning, match="randomly initialized"):
            model = model_class.from_pretrained(source, rngs=nnx.Rngs(seed))
        return np.asarray((getattr(model, "score", None) or model.qa_outputs).weight[...])

    assert np.array_equal(drawn(0), head.weight[...])
    assert not np.array_equal(drawn(1), head.weight[...])


def test_a_tied_copy_of_the_head_is_still_compared(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    source = write_hf_directory(tmp_path / "causal", config, weights_of(config))
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, source / "model.safetensors")
    with pytest.warns(UserWarning, match="randomly initialized"):
        LlamaForQuestionAnswering.from_pretrained(source)
    save_file(tensors | {"lm_head.weight": embedding + 1}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight: differs from the embedding"):
        LlamaForQuestionAnswering.from_pretrained(source)


@pytest.mark.parametrize("model_class", HEADS)
def test_the_decoder_and_a_head_load_each_others_checkpoints(
    tmp_path: Path, model_class: Any
) -> None:
    bare = hf_directory(tmp_path / "bare", LlamaModel)
    with pytest.warns(UserWarning, match="randomly initialized"):
        model = model_class.from_pretrained(bare)
    assert same(decoder_of(model), decoder_of(LlamaModel.from_pretrained(bare)))
    task = hf_directory(tmp_path / "task", model_class)
    decoder = decoder_of(LlamaModel.from_pretrained(task))
    assert same(decoder, decoder_of(model_class.from_pretrained(task)))


def test_another_heads_checkpoint(tmp_path: Path) -> None:
    """Only what is not there is new; as in transformers, a score of the same shape is kept."""
    source = hf_directory(tmp_path / "task", LlamaForSequenceClassification)
    with pytest.warns(UserWarning, match="randomly initialized score.bias, missing"):
        model = LlamaForTokenClassification.from_pretrained(source)
    old = LlamaForSequenceClassification.from_pretrained(source)
    assert np.array_equal(model.score.weight[...], old.score.weight[...])
    with pytest.warns(UserWarning, match="randomly initialized qa_outputs.bias, qa_outputs.weight"):
        LlamaForQuestionAnswering.from_pretrained(source)


def test_a_missing_language_model_head_is_an_error(tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "task", LlamaForSequenceClassification)
    with pytest.raises(ValueError) as caught:
        LlamaForCausalLM.from_pretrained(source)
    assert "lm_head.weight: missing; score.weight: unexpected" in str(caught.value)


def test_missing_decoder_weights_are_an_error_in_every_class(tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "task", LlamaForTokenClassification)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors")
    for model_class in (LlamaModel, *HEADS):
        with pytest.raises(ValueError, match=r"norm.weight: missing"):
            model_class.from_pretrained(source)


def test_num_labels_override(tmp_path: Path) -> None:
    causal = write_hf_directory(tmp_path / "causal", CONFIG, weights_of(CONFIG))
    with pytest.warns(UserWarning, match="randomly initialized"):
        model = LlamaForSequenceClassification.from_pretrained(causal, num_labels=7)
    assert model.score.weight.shape[0] == model.config.num_labels == 7
    model.save_pretrained(tmp_path / "seven")
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "seven")
    assert theirs.config.num_labels == 7
    assert theirs.config.id2label == model.config.id2label
    with pytest.raises(
        ValueError, match=r"score.weight: found shape \[7, 32\], expected \[3, 32\]"
    ):
        LlamaForSequenceClassification.from_pretrained(tmp_path / "seven", num_labels=3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_labels": 1},
        {"num_labels": 5},
        {"id2label": NAMES},
        {"id2label": NAMES, "label2id": {"odd": 9}},
        {"label2id": {"a": 0}},
        {"num_labels": 0},
        {"id2label": {}},
        {"num_labels": 2, "id2label": NAMES, "label2id": {"odd": 9}},
        {"problem_type": "ranking"},
        {"problem_type": ""},
        {"problem_type": "regression", "num_labels": 1},
        {"problem_type": "multi_label_classification"},
    ],
)
def test_label_fields_mean_the_same(fields: dict[str, Any]) -> None:
    theirs, ours = hf_config(BASE | fields), LlamaConfig.from_dict(BASE | fields)
    assert (ours.num_labels, ours.id2label) == (theirs.num_labels, theirs.id2label)
    assert theirs.label2id in (None, ours.label2id)
    assert ours.problem_type == theirs.problem_type
    written = json.loads(json.dumps(ours.to_dict()))
    assert LlamaConfig.from_dict(written) == ours
    again = hf_config(written)
    assert (again.num_labels, again.id2label) == (theirs.num_labels, theirs.id2label)
    if not fields:
        assert "id2label" not in written  # as transformers leaves it out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": -1}, "num_labels: found -1, expected a number up to"),
        ({"num_labels": "3"}, "num_labels: found '3', expected a number up to"),
        ({"id2label": ["a"]}, "id2label: found ['a'], expected names by number"),
        ({"id2label": {"x": "a"}}, "id2label: found {'x': 'a'}, expected names by number"),
        ({"id2label": NAMES, "label2id": [1]}, "label2id: found [1], expected numbers by name"),
        ({"problem_type": ["ranking"]}, "problem_type: found ['ranking'], expected a name or null"),
        (
            {"problem_type": "single_label_classification", "num_labels": 1},
            "problem_type: found 'single_label_classification' of 1 label",
        ),
        ({"classifier_dropout": 2}, "classifier_dropout: found 2, expected a number"),
        ({"token_classification_bias": False}, "token_classification_bias: found False"),
    ],
)
def test_bad_label_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LlamaConfig.from_dict(BASE | fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_new_number_of_labels_drops_the_old_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NAMED))
    assert LlamaConfig.from_pretrained(tmp_path).id2label == {0: "no", 1: "perhaps", 2: "yes"}
    changed = LlamaConfig.from_pretrained(tmp_path, num_labels=2)
    assert changed.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert dataclasses.replace(changed, vocab_size=9).num_labels == 2


@pytest.mark.parametrize("model_class", [LlamaModel, *HEADS])
def test_no_directory(tmp_path: Path, model_class: Any) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        model_class.from_pretrained(tmp_path / "absent")


def test_the_library_exports_every_class_of_transformers_llama() -> None:
    from transformers.models.llama import modeling_llama

    names = {name for name in modeling_llama.__all__ if name != "LlamaPreTrainedModel"}
    assert names <= set(llama_jax.__all__)


def test_heads_over_a_mesh() -> None:
    assert output_lines("workers.sharded_heads") == [model_class.__name__ for model_class in HEADS]


def test_training_needs_the_language_model_head(tmp_path: Path) -> None:
    source = hf_directory(tmp_path / "bare", LlamaModel)
    config = LlamaConfig.from_pretrained(source)
    abstract = nnx.eval_shape(lambda: LlamaForSequenceClassification(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"score.weight: missing"):
            llama_jax.checkpoints.huggingface.load_params(
                LlamaForSequenceClassification, source, params
            )
