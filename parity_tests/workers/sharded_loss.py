"""The fused loss on eight host devices against one. Run by `test_loss_sharded.py`; prints JSON lines."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from llama_jax.loss import fused_linear_cross_entropy
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.reference.errors import relative_error

use_host_devices(8)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

# fsdp divides 18, and sequence does not divide the rest
BATCH, SEQ, HIDDEN, CHUNK = 8, 6, 18, 4
MESHES = {
    "8x1": {"data": 8, "tensor": 1},
    "1x8": {"data": 1, "tensor": 8},
    "4x2": {"data": 4, "tensor": 2},
    "fsdp2-sequence2-tensor2": {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
}
VOCABS = {"even": 32, "prime": 37}


def step(operands, options):
    out = fused_linear_cross_entropy(**operands, **options)
    mix = jnp.linspace(-1.0, 2.0, out.loss.size).reshape(out.loss.shape)
    return jnp.sum(mix * out.loss) if out.loss.ndim else 7.5 * out.loss


def arrays(vocab, ignored):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, vocab, (BATCH, SEQ))
    labels[:ignored] = -100  # whole shards
    return {
        "hidden": rng.normal(size=(BATCH, SEQ, HIDDEN)),
        "kernel": rng.normal(size=(vocab, HIDDEN)),
        "bias": rng.normal(size=vocab),
        "scale": rng.normal(size=vocab),
        "weights": rng.random((BATCH, SEQ)),
    }, labels


def main() -> None:
    for (mesh_name, sizes), (vocab_name, vocab), reduction in itertools.product(
        MESHES.items(), VOCABS.items(), ("mean", "none")
    ):
        operands, labels = arrays(vocab, ignored=2)
        operands = {name: jnp.asarray(value) for name, value in operands.items()}
        options = {
            "labels": jnp.asarray(labels),
            "reduction": reduction,
            "z_loss": 0.01,
            "label_smoothing": 0.1,
            "chunk": CHUNK,
        }
        expected = jax.value_and_grad(step)(operands, options | {"mode": "reference"})
        axes = tuple(sizes)
        mesh = jax.make_mesh(tuple(sizes.values()), axes, (AxisType.Auto,) * len(axes))
        with jax.set_mesh(mesh):
            run = jax.jit(
                lambda operands, options=options: jax.value_and_grad(step)(operands, options)
            )
            actual, text = run(operands), run.lower(operands).compile().as_text()
        errors = {
            name: relative_error(np.asarray(actual[1][name]), np.asarray(expected[1][name]))
            for name in operands
        }
        errors["loss"] = abs(float(actual[0]) - float(expected[0])) / abs(float(expected[0]))
        print(
            json.dumps(
                {
                    "case": f"{mesh_name}-{vocab_name}-{reduction}",
                    "error": max(errors.values()),
                    "worst": max(errors, key=errors.get),
                    "collectives": collectives_in_loops(text),
                    "scatters": text.count(" reduce-scatter("),
                }
            ),
            flush=True,
        )


def collectives_in_loops(text: str) -> list[str]:
    """Shapes of the collectives in the bodies of while loops of a compiled program."""
    computations = re.split(r"\n(?=%|ENTRY)", text)
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    shapes = []
    for computation in computations:
        name = re.match(r"%?([\w.\-]+)", computation)
        if name and name[1] in bodies:
            shapes += re.findall(r"= (\S+) (?:all-reduce|all-gather|reduce-scatter)\(", computation)
    return shapes


if __name__ == "__main__":
    main()
