"""Check an exported model with PyTorch: transformers finds every tensor, and the loss is the same."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def torch_loss(directory: Path, batches: Iterable[dict[str, np.ndarray]]) -> tuple[float, int]:
    """Cross-entropy per token of the transformers model in float32, and the number of tokens.

    Args:
        batches: dictionaries of arrays [rows, seq], see `train.data.windows.window`. A mask and restarting
            positions separate the documents in a row.

    Raises:
        ValueError: torch or transformers are not installed, or transformers finds a tensor that is missing,
            unexpected or of another shape.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(
            f"verify: {error.name} is not installed; in the checkout: pip install '.[parity]'"
        ) from None

    logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    problems = {name: sorted(map(str, report[name])) for name in report if report[name]}
    if problems:
        raise ValueError(f"{directory}: transformers cannot load every tensor: {problems}")
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
            same_document = segments[:, None, :, None] == segments[:, None, None, :]
            logits = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=same_document & causal,
                use_cache=False,
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
    """The largest relative difference between two computations of one mean loss.

    For float32 some tens of its epsilon, since sums are ordered differently; for the half precisions twice
    their epsilon, to which every logit is rounded (the mean over many tokens is more exact).
    """
    return {"float64": 1e-6, "float32": 5e-6, "bfloat16": 1.6e-2, "float16": 2e-3}[
        str(compute_dtype)
    ]
