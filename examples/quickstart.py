"""Load a Hugging Face checkpoint in JAX and in PyTorch, and compare the two.

    python examples/quickstart.py [HF_DIR]

Without a directory, it uses a small checkpoint with random weights.
"""

import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from llama_jax import PRESETS, LlamaForCausalLM


def main(checkpoint: str) -> float:
    """Print the loss of each and return the largest difference between their logits."""
    ours = LlamaForCausalLM.from_pretrained(checkpoint, dtype=jnp.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    ids = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 32))
    out = ours(jnp.asarray(ids), labels=jnp.asarray(ids))
    with torch.no_grad():
        reference = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids))

    difference = float(np.abs(np.asarray(out.logits) - reference.logits.numpy()).max())
    print(f"loss: {float(out.loss):.6f} in JAX, {float(reference.loss):.6f} in PyTorch")
    print(f"largest difference between the logits: {difference:.1e}")
    return difference


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as checkpoint:
            LlamaForCausalLM(PRESETS["tiny-4m"], rngs=nnx.Rngs(0)).save_pretrained(checkpoint)
            main(checkpoint)
