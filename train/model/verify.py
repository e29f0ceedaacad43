"""PyTorch's word on an exported model: transformers loads it whole, and computes the same loss."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def torch_loss(directory: Path, batches: Iterable[dict[str, np.ndarray]]) -> tuple[float, int]:
    """Cross-entropy per token of transformers' model in float32, and the number of tokens.

    Args:
        batches: windows as `train.data.windows.window` has them, arrays [rows, seq]. Documents packed into
            a row are kept apart by a mask and by positions that begin anew.

    Raises:
        ValueError: torch or transformers are not installed, or transformers finds a tensor missing, left
            over or of another shape.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"verify: expected {error.name} to be installed") from None

    logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    faults = {name: sorted(map(str, report[name])) for name in report if report[name]}
    if faults:
        raise ValueError(f"{directory}: transformers found {faults}, expected every tensor to fit")
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            ids, positions, segments, labels = (
                torch.from_numpy(batch[name].astype(np.int64))
                for name in ("input_ids", "position_ids", "segment_ids", "labels")
            )
            length = ids.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            same = segments[:, None, :, None] == segments[:, None, None, :]
            logits = model(
                input_ids=ids, position_ids=positions, attention_mask=same & causal, use_cache=False
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            total += loss.item()
            count += int((labels != -100).sum())
    return total / max(count, 1), count


def relative_difference(one: float, other: float) -> float:
    """|one - other| / |other|."""
    return abs(one - other) / max(abs(other), 1e-30)


def tolerance(compute_dtype: Any) -> float:
    """How far two computations of one mean loss may be apart, relatively.

    For float32 some tens of its epsilon, for sums in other orders; for the half precisions two of their own
    epsilon: each logit is rounded to it, the mean over many tokens is nearer.
    """
    return {"float64": 1e-6, "float32": 5e-6, "bfloat16": 1.6e-2, "float16": 2e-3}[
        str(compute_dtype)
    ]
