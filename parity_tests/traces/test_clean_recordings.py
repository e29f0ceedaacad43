"""No false alarm: recordings of transformers in several precisions, of many configurations."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.harness.cases import BY_NAME, hf_model, weights_of, write_hf_directory
from parity_tests.record_torch import record
from parity_tests.traces.check import check
from parity_tests.traces.test_traces import Tf32, ids_of

CASES = (
    *("mha", "gqa_2_to_1", "gqa_4_to_1", "mqa", "head_dim_wider", "head_dim_narrower", "tied"),
    *("padding_token", "attention_bias", "mlp_bias", "eps_1e-6", "theta_500000", "act_gelu"),
    *("act_relu", "rope_llama31", "rope_yarn", "rope_linear"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_clean_recordings(name: str, tmp_path: Path) -> None:
    """Six of each configuration: 102."""
    case, compiled = BY_NAME[name], dict[Any, Any]()
    for seed, attention in enumerate(("eager", "sdpa")):
        weights = weights_of(case.config, seed)
        directory = tmp_path / str(seed)
        write_hf_directory(directory / "checkpoint", case.config, weights)
        for kind in ("float32", "bfloat16", "tf32"):
            model = hf_model(case.config, weights, attention).eval()
            if kind == "bfloat16":
                model = model.to(torch.bfloat16)
            is_tf32 = kind == "tf32"
            with Tf32() if is_tf32 else contextlib.nullcontext():
                settings = {"matmul": "tf32"} if is_tf32 else {}
                trace = record(model, ids_of(seed), directory / kind, settings=settings)
            verdict = check(trace, directory / "checkpoint", compiled=compiled)
            assert verdict.holds, [(r.name, r.direction, r.ratio) for r in verdict.departures]
