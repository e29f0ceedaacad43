"""Record a Hugging Face checkpoint: as transformers runs it, or as llama_jax does."""

import contextlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llama_jax import LlamaForCausalLM
from llama_jax.checkpoints import huggingface
from llama_jax.files.paths import source_path
from parity_tests.report.programs.checkpoint import open_checkpoint
from parity_tests.report.tokens import bundled_tokens, read_tokens
from parity_tests.traces.precision import DTYPES
from parity_tests.traces.record_jax import record_jax

_LAYER = "model.layers.{layer}"
_NAMES = {  # of llama_jax's remat policies
    "query": f"{_LAYER}.self_attn.q_proj.output",
    "key": f"{_LAYER}.self_attn.k_proj.output",
    "value": f"{_LAYER}.self_attn.v_proj.output",
    "output": f"{_LAYER}.self_attn.o_proj.output",
    "gate": f"{_LAYER}.mlp.gate_proj.output",
    "up": f"{_LAYER}.mlp.up_proj.output",
    "down": f"{_LAYER}.mlp.down_proj.output",
    "logits": "lm_head.output",
}


def record_checkpoint(
    directory: Path,
    out: Path,
    *,
    program: str = "transformers",
    tokens: Path | None = None,
    length: int = 512,
    dtype: str = "float32",
    attention: str = "sdpa",
    autocast: str | None = None,
    backward: bool = True,
) -> None:
    """Write a trace of a checkpoint.

    Args:
        directory: or a name on the Hub.
        out: the folder to write; must not exist.
        program: "transformers" or "llama_jax".
        tokens: a file of token ids; default: a text in this repository.
        length: tokens at most.
        dtype: of the weights, one of `DTYPES`.
        attention, autocast: of transformers: its name of the implementation, and a dtype or None.
        backward: record gradients too.

    Raises:
        ValueError: in one line: no checkpoint, no tokens, or a folder that exists.
    """
    checkpoint = open_checkpoint(source_path(directory))
    ids = bundled_tokens(checkpoint) if tokens is None else read_tokens(tokens, checkpoint)
    ids = ids[:, :length]
    if program == "transformers":
        _record_transformers(checkpoint.directory, out, ids, dtype, attention, autocast, backward)
        return
    model = LlamaForCausalLM.from_pretrained(checkpoint.directory, dtype=DTYPES[dtype])
    tokens_of_model = jnp.asarray(ids, jnp.int32)

    def loss(model: LlamaForCausalLM) -> tuple[jnp.ndarray, dict[str, jnp.ndarray]]:
        result = model(tokens_of_model, labels=tokens_of_model)
        assert result.loss is not None
        return result.loss, {"logits": result.logits}

    record_jax(
        loss,
        model,
        out,
        inputs={"input_ids": ids},
        names=_NAMES,
        weights=lambda model: dict(huggingface.to_hf_tensors(model)),
        backward=backward,
        program="llama_jax",
    )


def _record_transformers(
    directory: Path,
    out: Path,
    ids: np.ndarray,
    dtype: str,
    attention: str,
    autocast: str | None,
    backward: bool,
) -> None:
    import torch

    from parity_tests import record_torch

    model = record_torch.load(directory, getattr(torch, dtype), attention)
    context = (
        torch.autocast("cpu", getattr(torch, autocast)) if autocast else contextlib.nullcontext()
    )
    with context:
        record_torch.record(model, torch.from_numpy(ids), out, backward=backward)
