"""MaxText itself, run by its own interpreter: makes a checkpoint, or loads one, and computes logits.

python maxtext_program.py TOKENS.npy LOGITS.npy [--save DIR] [CONFIG.yml] NAME=VALUE...

With --save a model with random weights is saved to DIR, as MaxText's parameter-only checkpoints are;
otherwise the settings name the checkpoint: load_parameters_path=DIR/0/items.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def main(tokens_file: str, logits_file: str, *settings: str) -> None:
    from flax import nnx
    from jax.sharding import Mesh
    from maxtext.common import checkpointing
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, maxtext_utils_nnx, model_creation_utils

    save = None
    if settings[0] == "--save":
        save, settings = settings[1], settings[2:]
    if not settings[0].endswith(".yml"):
        settings = (str(Path(pyconfig.__file__).with_name("base.yml")), *settings)
    config = pyconfig.initialize(["program", *settings])
    mesh = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    if save is None:
        model = model_creation_utils.from_pretrained(config, mesh)
        model = model[0] if isinstance(model, tuple) else model
    else:
        rngs = maxtext_utils_nnx.create_nnx_rngs(config, rng_key=jax.random.key(0))
        model = model_creation_utils.from_config(config, mesh=mesh, rngs=rngs)

        def randomize(path: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
            """Norms other than ones, which would hide their order."""
            if "scale" not in path:
                return leaf
            values = leaf.get_value()
            seed = sum("/".join(map(str, path)).encode())
            noise = jax.random.normal(jax.random.key(seed), values.shape, values.dtype)
            return leaf.replace(values + noise / 5)

        state = nnx.state(model, nnx.Param)
        nnx.update(model, nnx.map_state(randomize, state))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        checkpointing.save_params_to_path(save, {"params": params})
    tokens = jnp.asarray(np.load(tokens_file))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with mesh:
        logits = model(
            tokens,
            positions,
            decoder_segment_ids=jnp.ones_like(tokens),
            enable_dropout=False,
            model_mode="train",
        )
    np.save(logits_file, np.asarray(logits, np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
