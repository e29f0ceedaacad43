"""Load a Hugging Face checkpoint in JAX and in PyTorch, and compare the two.

    python examples/quickstart.py [HF_DIR]

Without a directory, a small random checkpoint is made first.
"""

import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from llama_jax import PRESETS, LlamaForCausalLM


def main(directory: str) -> float:
    """Print the losses of both and return the largest difference of the logits."""
    ours = LlamaForCausalLM.from_pretrained(directory, dtype=jnp.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)

    ids = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 32))
    out = ours(jnp.asarray(ids), labels=jnp.asarray(ids))
    with torch.no_grad():
        reference = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids))

    difference = float(np.abs(np.asarray(out.logits) - reference.logits.numpy()).max())
    print(f"loss: {float(out.loss):.6f} in JAX, {float(reference.loss):.6f} in PyTorch")
    print(f"largest difference of the logits: {difference:.1e}")
    return difference


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as made:
            LlamaForCausalLM(PRESETS["tiny-4m"], rngs=nnx.Rngs(0)).save_pretrained(made)
            main(made)
