"""The oracle is held to Hugging Face's model over the whole matrix.

Only then may it judge ours. In float32 the two differ by rounding alone; so does the oracle in
float64 from Hugging Face in float32.
"""

from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.harness.cases import (
    BY_NAME,
    MATRIX,
    MORE_ACTIVATIONS,
    Case,
    blind_rows,
    hf_inputs,
    hf_model,
    inputs_of,
    torch_inputs,
    weights_of,
)
from parity_tests.reference.errors import relative_error, rms_error
from parity_tests.reference.oracle import IGNORE, oracle

# float32 rounding through two layers is about 1e-6.
BAR = 1e-5


def bar(inputs: dict[str, Any], dtype: torch.dtype) -> float:
    """Hugging Face forms its angles in float32, wrong by an ulp of the angle: at position p by
    p * 2^-23 radians. The float64 oracle does not share that error, the float32 one does."""
    far = int(inputs.get("position_ids", np.zeros(1)).max())
    return BAR if dtype == torch.float32 else BAR + far * 2.0**-23


def projection(logits: torch.Tensor) -> torch.Tensor:
    """A scalar which depends on every logit, for inputs without labels."""
    return (
        logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    ).mean()


def gradients(out: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the loss, or of a projection of the logits; zeros for an embedding that was not asked."""
    scalar = projection(out.logits) if out.loss is None else out.loss
    grads = torch.autograd.grad(scalar, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def rows(attention: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The queries `seen` [B, T] of probabilities [B, N, T, S], as [queries, N, S]."""
    return attention.transpose(1, 2)[seen]


def without_blind_targets(inputs: dict[str, Any]) -> dict[str, Any]:
    """Labels whose query sees nothing do not count: eager attention does something else there."""
    blind = blind_rows(inputs)
    if blind is False or "labels" not in inputs:
        return inputs
    labels = inputs["labels"].copy()
    labels[:, 1:][blind[:, :-1]] = IGNORE
    return inputs | {"labels": labels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["oracle32", "oracle64"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [*MATRIX, *MORE_ACTIVATIONS], ids=repr)
def test_oracle_is_hugging_face(case: Case, attention: str, dtype: torch.dtype) -> None:
    config, weights = case.config, weights_of(case.config)
    inputs = inputs_of(case.inputs, config)
    if attention == "eager":
        inputs = without_blind_targets(inputs)

    model = hf_model(config, weights, attention)
    wanted = model(
        **hf_inputs(inputs, attention),
        output_hidden_states=True,
        output_attentions=attention == "eager",
    )
    parameters = {name: w.to(dtype).requires_grad_() for name, w in weights.items()}
    got = oracle(config, parameters, **torch_inputs(inputs), dtype=dtype)
    allowed = bar(inputs, dtype)

    seen = torch.ones(case.inputs.batch, case.inputs.length, dtype=torch.bool)
    if attention == "eager":
        seen &= ~torch.as_tensor(blind_rows(inputs))
    keep = inputs.get("logits_to_keep", 0)
    kept = seen[:, slice(-keep, None) if isinstance(keep, int) else keep]
    assert relative_error(got.logits[kept], wanted.logits[kept]) <= allowed
    assert len(got.hidden_states) == len(wanted.hidden_states)
    for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        assert relative_error(ours[seen], theirs[seen]) <= allowed
    if attention == "eager":
        for ours, theirs in zip(got.attentions, wanted.attentions, strict=True):
            assert relative_error(rows(ours, seen), rows(theirs, seen)) <= allowed

    if case.inputs.labels == "none":  # torch divides zero by zero
        assert wanted.loss.isnan()
        assert got.loss == 0
        assert not any(grad.any() for grad in gradients(got, parameters).values())
        return
    if attention == "eager" and case.inputs.labels is None and not kept.all():
        return  # the projection would weigh the blind rows
    if wanted.loss is not None:
        assert relative_error(got.loss, wanted.loss) <= allowed
    theirs = gradients(wanted, dict(model.named_parameters()))
    for name, grad in gradients(got, parameters).items():
        assert rms_error([grad], [theirs[name]]) <= allowed, name


def test_scattered_positions_do_not_change_the_mask() -> None:
    """Positions turn the heads; who sees whom is the order of the sequence."""
    case = BY_NAME["positions_scattered"]
    inputs = torch_inputs(inputs_of(case.inputs, case.config))
    weights = weights_of(case.config)
    before = oracle(case.config, weights, **inputs).logits
    inputs["input_ids"][:, -1] += 1
    after = oracle(case.config, weights, **inputs | {"input_ids": inputs["input_ids"] % 61}).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
