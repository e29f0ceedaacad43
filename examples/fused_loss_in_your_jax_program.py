"""Use the fused loss in a program without a Llama: a bigram model in plain JAX, trained with optax.

    python examples/fused_loss_in_your_jax_program.py

`fused_linear_cross_entropy` replaces `logits = hidden @ kernel` and the cross-entropy that follows. Neither
the forward nor the backward pass allocates a [tokens, vocab] buffer.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from llama_jax import fused_linear_cross_entropy

VOCAB, HIDDEN, STEPS = 256, 64, 60


def loss(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next byte, in nats."""
    hidden = params["embedding"][tokens[:, :-1]]  # [batch, seq - 1, hidden]
    return fused_linear_cross_entropy(hidden, params["kernel"], tokens[:, 1:]).loss


def main() -> tuple[float, float]:
    """Train on the bytes of this file; return the first and the last loss."""
    text = jnp.asarray(list(Path(__file__).read_bytes()))
    tokens = text[: len(text) // 64 * 64].reshape(-1, 64)
    embedding_key, kernel_key = jax.random.split(jax.random.key(0))
    params = {
        "embedding": 0.1 * jax.random.normal(embedding_key, (VOCAB, HIDDEN)),
        "kernel": 0.1 * jax.random.normal(kernel_key, (HIDDEN, VOCAB)),
    }
    optimizer = optax.adam(3e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {STEPS} steps")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
