"""`--verify`: compare the logits of the output, in JAX, with PyTorch's of the source.

Both are compared with the same model in float64; the error here may be at most `ROUNDING_RATIO` times
PyTorch's (docs/parity.md, P2).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.casting import CastRule
from convert.checkpoint import Checkpoint
from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.checkpoints import huggingface
from llama_jax.files.memory import available_memory
from parity_tests.reference.tolerances import ROUNDING_RATIO

_TOKENS = 512
_TEXT = Path(__file__).resolve().parent.parent / "LICENSE"
_BYTES_PER_PARAMETER = 20  # twice in float32, once in float64, and a tensor being read


class Comparison(NamedTuple):
    """Root mean square errors of the logits against float64, relative to their size."""

    tokens: int
    ours: float
    torch: float


def require_torch_and_memory(checkpoint: Checkpoint) -> None:
    """Raise ValueError where torch is not installed or memory is short, before anything is done."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--verify: {error.name} is not installed; in the checkout: pip install '.[parity]'"
        ) from None
    needed, available = checkpoint.parameters * _BYTES_PER_PARAMETER, available_memory()
    if available is not None and available < needed:
        raise ValueError(
            f"--verify: {available} bytes of memory are free, expected {needed} for three models; "
            "without --verify, tensors are still compared bit for bit"
        )


def compare_logits(
    source: Path, checkpoint: Checkpoint, written: Checkpoint, cast_rule: CastRule
) -> Comparison:
    """Run both on the same tokens: `written` by this library, the source by transformers.

    Where transformers can read `source` itself, it does; then `cast_rule` rounds its weights as the written
    ones were.

    Raises:
        ValueError: the error is more than `ROUNDING_RATIO` times PyTorch's.
    """
    import torch

    from parity_tests.reference.errors import rms_error
    from parity_tests.reference.oracle import oracle

    dtypes = {spec.name: spec.dtype for spec in written.tensors}
    torch_model = _torch_model(source, checkpoint)
    with torch.no_grad():
        for name, parameter in torch_model.named_parameters():
            values = cast_rule(name, parameter.numpy(), dtypes[name]).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))
    config = LlamaConfig.from_dict(checkpoint.config)
    ids = _token_ids(checkpoint.files, config)
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        torch_logits = torch_model(tokens).logits
        weights = {name: value.double() for name, value in torch_model.named_parameters()}
        exact = oracle(checkpoint.config, weights, input_ids=tokens).logits
    del torch_model, weights
    model = huggingface.from_hf_tensors(LlamaForCausalLM, config, _Tensors(written), jnp.float32)
    logits = jax.jit(lambda model, ids: model(ids).logits)(model, jnp.asarray(ids))
    error, torch_error = rms_error([logits], [exact]), rms_error([torch_logits], [exact])
    if not error <= ROUNDING_RATIO * torch_error:
        raise ValueError(
            f"{source}: the logits of the output are {error:.2e} from float64, PyTorch's "
            f"{torch_error:.2e}; expected at most {ROUNDING_RATIO} times that"
        )
    return Comparison(ids.size, error, torch_error)


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name, each read when it is accessed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> np.ndarray:
        return self.checkpoint.load(name)

    def __iter__(self) -> Any:
        return iter(spec.name for spec in self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)


def _torch_model(source: Path, checkpoint: Checkpoint) -> Any:
    """transformers' model in float32, by its own reader where it has one."""
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    transformers.utils.logging.disable_progress_bar()
    if checkpoint.format == "Hugging Face" and "quantization" not in checkpoint.facts:
        return transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(checkpoint.config))
    tensors: dict[str, Any] = {}
    if source.is_file() and "-of-" not in source.name:  # it does not read shards
        with redirect_stderr(io.StringIO()):  # a progress bar
            loaded = load_gguf_checkpoint(source, return_tensors=True, model_to_load=model)
        tensors = loaded["tensors"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = tensors.get(name)
            if values is None:
                values = torch.from_numpy(checkpoint.load(name).astype(np.float32))
            parameter.copy_(values)
    return model.eval()


def _token_ids(files: Mapping[str, bytes], config: LlamaConfig) -> np.ndarray:
    """Real text by the checkpoint's own tokenizer [1, tokens]; without one, every id in turn."""
    length = min(_TOKENS, config.max_position_embeddings)
    ids = [number % config.vocab_size for number in range(length)]
    if "tokenizer.json" in files:
        from tokenizers import Tokenizer

        text = _TEXT.read_text(encoding="utf-8")
        ids = Tokenizer.from_buffer(files["tokenizer.json"]).encode(text).ids[:length]
    return np.asarray([ids], np.int32)
