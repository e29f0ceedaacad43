"""A trained model as a Hugging Face directory, tokenizer included."""

import shutil
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from llama_jax.tasks import LlamaForCausalLM


def export_model(model: LlamaForCausalLM, directory: Path, tokenizer: Path) -> None:
    """Write the model and the files of the directory `tokenizer`; every process must call it.

    Weights that lie on several processes' devices are gathered on each host.
    """
    if jax.process_count() > 1:
        model = jax.tree.map(
            lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), model
        )
    if jax.process_index() == 0:
        model.save_pretrained(directory)
        for file in sorted(tokenizer.iterdir()):
            shutil.copyfile(file, directory / file.name)
