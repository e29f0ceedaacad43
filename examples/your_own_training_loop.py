"""Write your own training loop around `LlamaForCausalLM`, with parameters and batches sharded over a mesh.

    python examples/your_own_training_loop.py

It uses all devices. To simulate four on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=4.
`python -m train` also handles data, checkpoints and logging.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import PRESETS, LlamaForCausalLM, parameter_shardings

STEPS, BATCH, SEQ = 20, 8, 64


def main() -> tuple[float, float]:
    """Overfit one batch; return the first and the last loss."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    config = PRESETS["tiny-4m"]
    optimizer = optax.adamw(1e-3)

    with jax.set_mesh(mesh):
        model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
        graphdef, variables = nnx.split(model)
        params = jax.device_put(nnx.to_pure_dict(variables), parameter_shardings(model, mesh))
        state = jax.jit(optimizer.init)(params)

        @jax.jit
        def step(params, state, ids):
            def loss(params):
                return nnx.merge(graphdef, params)(ids, labels=ids).loss

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        ids = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, SEQ))
        ids = jax.device_put(jnp.asarray(ids, jnp.int32), NamedSharding(mesh, P("fsdp")))
        losses = []
        for _ in range(STEPS):
            params, state, value = step(params, state, ids)
            losses.append(float(value))
    print(f"mesh {dict(mesh.shape)}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in {STEPS} steps")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
