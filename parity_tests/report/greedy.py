"""The longest greedy continuation that two programs agree on, where both models fit into memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaForCausalLM as HFLlama

from llama_jax import LlamaForCausalLM
from parity_tests.report.programs.checkpoint import Checkpoint

PROMPT, NEW = 32, 64  # tokens


class Greedy(NamedTuple):
    """`same` of `asked` new tokens are those of the yardstick, from the first on."""

    same: int
    asked: int


Continue = Callable[[np.ndarray, int], np.ndarray]


def greedy(ours: Continue, theirs: Continue, ids: np.ndarray) -> Greedy:
    """Both continue the first tokens of `ids` [1, T] until one of them ends.

    ours, theirs: `(prompt [1, P], most new tokens) -> prompt and continuation [1, P + N]`.
    """
    prompt = ids[:, : max(1, min(PROMPT, ids.shape[1] // 2))]
    one, other = (run(prompt, NEW)[0, prompt.shape[1] :] for run in (ours, theirs))
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    same = int(differ[0]) if differ.size else length
    return Greedy(same, max(len(one), len(other)))


def our_continuation(checkpoint: Checkpoint, dtype: Any, ids: np.ndarray, new: int) -> np.ndarray:
    model = LlamaForCausalLM.from_pretrained(checkpoint.directory, dtype=dtype)
    return np.asarray(model.generate(jnp.asarray(ids, jnp.int32), max_new_tokens=new))


def torch_continuation(checkpoint: Checkpoint, dtype: Any, ids: np.ndarray, new: int) -> np.ndarray:
    name = getattr(torch, np.dtype(dtype).name)
    model = HFLlama.from_pretrained(checkpoint.directory, dtype=name).eval()
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        return model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
        ).numpy()
