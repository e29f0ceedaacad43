"""The oracle is compared with Hugging Face's model over the whole test matrix.

In float32 the two may differ only by rounding; so may the oracle in float64 from Hugging Face's float32.
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
    """Hugging Face computes its angles in float32, with an error of an ulp: p * 2^-23 radians at position
    p. The oracle has the same error in float32, but not in float64."""
    last = int(inputs.get("position_ids", np.zeros(1)).max())
    return BAR if dtype == torch.float32 else BAR + last * 2.0**-23


def projection(logits: torch.Tensor) -> torch.Tensor:
    """A scalar that depends on every logit, for inputs without labels."""
    return (
        logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    ).mean()


def gradients(out: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the loss, or of a projection of the logits; zeros for an embedding that is not used."""
    scalar = projection(out.logits) if out.loss is None else out.loss
    grads = torch.autograd.grad(scalar, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def rows(attention: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention probabilities [B, N, T, S] of the queries in `seen`, bool [B, T], as [queries, N, S]."""
    return attention.transpose(1, 2)[seen]


def without_blind_targets(inputs: dict[str, Any]) -> dict[str, Any]:
    """Ignore labels whose query sees no key: eager attention differs there."""
    blind = blind_rows(inputs)
    if isinstance(blind, bool) or "labels" not in inputs:
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
    expected = model(
        **hf_inputs(inputs, attention),
        output_hidden_states=True,
        output_attentions=attention == "eager",
    )
    parameters = {name: w.to(dtype).requires_grad_() for name, w in weights.items()}
    out = oracle(config, parameters, **torch_inputs(inputs), dtype=dtype)
    allowed = bar(inputs, dtype)

    seen = torch.ones(case.inputs.batch, case.inputs.length, dtype=torch.bool)
    if attention == "eager":
        seen &= ~torch.as_tensor(blind_rows(inputs))
    keep = inputs.get("logits_to_keep", 0)
    kept = seen[:, slice(-keep, None) if isinstance(keep, int) else keep]
    assert relative_error(out.logits[kept], expected.logits[kept]) <= allowed
    assert len(out.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(ours[seen], theirs[seen]) <= allowed
    if attention == "eager":
        for ours, theirs in zip(out.attentions, expected.attentions, strict=True):
            assert relative_error(rows(ours, seen), rows(theirs, seen)) <= allowed

    if case.inputs.labels == "none":  # torch divides zero by zero
        assert expected.loss.isnan()
        assert out.loss == 0
        assert not any(grad.any() for grad in gradients(out, parameters).values())
        return
    if attention == "eager" and case.inputs.labels is None and not kept.all():
        return  # the projection would include rows that see nothing
    if expected.loss is not None:
        assert relative_error(out.loss, expected.loss) <= allowed
    theirs = gradients(expected, dict(model.named_parameters()))
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in gradients(out, parameters).items():
        if not grad.any():
            # of a single key; on some processors torch leaves rounding
            assert float(theirs[name].abs().max()) <= allowed * largest, name
        else:
            assert rms_error([grad], [theirs[name]]) <= allowed, name


def test_scattered_positions_do_not_change_the_mask() -> None:
    """Positions only set the rotary angles; the causal mask follows the order of the sequence."""
    case = BY_NAME["positions_scattered"]
    inputs = torch_inputs(inputs_of(case.inputs, case.config))
    weights = weights_of(case.config)
    before = oracle(case.config, weights, **inputs).logits
    inputs["input_ids"][:, -1] += 1
    after = oracle(case.config, weights, **inputs | {"input_ids": inputs["input_ids"] % 61}).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
