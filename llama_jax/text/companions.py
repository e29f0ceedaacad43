"""The files beside a model's weights that travel with it: tokenizer, chat templates, generation config.

One list for every route: `train` (tokenize, run, export), `convert` and `quantize`.
"""

import os
import shutil
from pathlib import Path

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
TEMPLATES = "additional_chat_templates"  # a directory of *.jinja
# where a run of `python -m train` keeps its tokenizer
RUN_TOKENIZER = "tokenizer"


def tokenizer_home(directory: Path) -> Path:
    """The directory of the tokenizer's files: a run has them in a folder of their own."""
    inner = directory / RUN_TOKENIZER
    return inner if inner.is_dir() else directory


def companion_files(
    directory: Path, *, tokenizer: bool = True, generation: bool = True
) -> dict[str, Path]:
    """Each companion of a model's directory, by the name it has in a Hugging Face directory.

    Args:
        directory: of Hugging Face, Orbax or Meta, or the folder of a run.
        tokenizer: with the tokenizer and its chat templates.
        generation: with generation_config.json.

    Returns:
        Name to path, links that lead nowhere included.
    """
    found: dict[str, Path] = {}
    if generation:
        found[GENERATION_CONFIG] = directory / GENERATION_CONFIG
    if tokenizer:
        home = tokenizer_home(directory)
        found |= {name: home / name for name in TOKENIZER_FILES}
        templates = sorted((home / TEMPLATES).glob("*.jinja"))
        found |= {f"{TEMPLATES}/{path.name}": path for path in templates}
    return {name: path for name, path in found.items() if os.path.lexists(path)}


def copy_companions(
    source: Path, directory: Path, *, tokenizer: bool = True, generation: bool = True
) -> list[str]:
    """Copy the companions of `source` into `directory`, each complete or not at all.

    Companions that `directory` has of another model, and `source` has not, are removed: they would be
    read as if they belonged to it.

    Returns:
        The names, in the order of `companion_files`.

    Raises:
        OSError: one that cannot be read or written.
    """
    wanted = companion_files(source, tokenizer=tokenizer, generation=generation)
    for name, path in wanted.items():
        copy_file(path, directory / name)
    there = companion_files(directory, tokenizer=tokenizer, generation=generation)
    for name, path in there.items():
        if name not in wanted and path == directory / name:
            path.unlink()
    return list(wanted)


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file and give it its name when it is complete."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f"{destination.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, destination)
