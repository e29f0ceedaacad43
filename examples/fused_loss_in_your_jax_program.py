"""The fused loss in a program that is not a Llama: a bigram model in plain JAX, trained with optax.

    python examples/fused_loss_in_your_jax_program.py

`fused_linear_cross_entropy` takes the place of `logits = hidden @ kernel` and a cross-entropy. No buffer of
[tokens, vocab] is held, neither forward nor backward.
"""

import jax
import jax.numpy as jnp
import optax

from llama_jax import fused_linear_cross_entropy

VOCAB, HIDDEN, STEPS = 256, 64, 60


def loss(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of each next byte, in nats."""
    hidden = params["embedding"][tokens[:, :-1]]  # [batch, seq - 1, hidden]
    return fused_linear_cross_entropy(hidden, params["kernel"], tokens[:, 1:]).loss


def main() -> tuple[float, float]:
    """Train on this file's own bytes; returns the first and the last loss."""
    with open(__file__, "rb") as file:
        text = jnp.frombuffer(file.read(), jnp.uint8).astype(jnp.int32)
    tokens = text[: len(text) // 64 * 64].reshape(-1, 64)
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "embedding": 0.1 * jax.random.normal(first, (VOCAB, HIDDEN)),
        "kernel": 0.1 * jax.random.normal(second, (HIDDEN, VOCAB)),
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
