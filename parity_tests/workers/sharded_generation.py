"""Generate on eight host devices; prints "same" or the tokens. Run by `test_generation.py`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.sharding import parameter_shardings
from parity_tests.harness.host_devices import use_host_devices

use_host_devices(8)

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=None,
    initializer_range=0.3,
)


def main() -> None:
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, 64, (4, 6))
    mask = np.ones_like(ids)
    mask[1, :2] = 0
    want = np.asarray(model.generate(ids, mask, max_new_tokens=8))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(model)
        placed = jax.device_put(nnx.to_pure_dict(state), parameter_shardings(model, mesh))
        nnx.replace_by_pure_dict(state, placed)
        split = nnx.merge(graph, state)
        got = np.asarray(split.generate(jnp.asarray(ids), mask, max_new_tokens=8))
    print("same" if np.array_equal(got, want) else f"{got.tolist()} {want.tolist()}")


if __name__ == "__main__":
    main()
