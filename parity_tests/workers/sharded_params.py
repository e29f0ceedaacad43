"""Load the weights of a directory over a mesh of eight host devices. Run by `test_hf_params.py`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import LlamaForCausalLM
from llama_jax.checkpoints.huggingface import load_params
from parity_tests.harness.host_devices import use_host_devices
from train.data.placement import place_batch, rows_of_process
from train.options import MeshOptions, RunOptions
from train.program.build import batch_sharding, run_program

use_host_devices(8)


def main() -> None:
    directory = sys.argv[1]
    axes = MeshOptions(data=1, fsdp=2, sequence=2, tensor=2)
    options = RunOptions(batch_size=8, sequence_length=8, micro_batches=2, mesh=axes)
    model = LlamaForCausalLM.from_pretrained(directory)
    program = run_program(options, model.config)
    params = load_params(LlamaForCausalLM, directory, program.params)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    split = 0
    for path, leaf in flat:
        parameter = model
        for key in path:
            parameter = getattr(parameter, key.key)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(parameter[...]))
        split += leaf.addressable_shards[0].data.size < leaf.size
    assert split == len(flat), "every weight must be split over this mesh"

    # so is a batch, placed by its rows, in zig-zag order
    shape = program.batch.input_ids.shape
    rows = rows_of_process(program.batch)
    assert rows == list(range(8))
    values = np.arange(8 * 8, dtype=np.int32).reshape(8, 8)
    names = ("input_ids", "labels", "segment_ids", "position_ids")
    placed = place_batch(program.batch, rows, dict.fromkeys(names, values))
    slots = [0, 1, 6, 7, 2, 3, 4, 5]
    np.testing.assert_array_equal(np.asarray(placed.labels), values[:, slots].reshape(shape))
    assert placed.labels.sharding == batch_sharding(program.mesh)
    assert jnp.asarray(placed.labels).addressable_shards[0].data.shape == (2, 2, 4)


if __name__ == "__main__":
    main()
