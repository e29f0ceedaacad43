"""The files that accompany a model's weights: tokenizer, chat templates, generation config.

`train` (tokenize, run, export), `convert` and `quantize` all copy the files listed here.
"""

from pathlib import Path

from llama_jax.files.staging import copy_file

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
    """The directory of the tokenizer's files; in a training run that is a subdirectory."""
    inner = directory / RUN_TOKENIZER
    return inner if inner.is_dir() else directory


def companion_files(
    directory: Path, *, tokenizer: bool = True, generation: bool = True
) -> dict[str, Path]:
    """Paths of a model's companion files, by their names in a Hugging Face directory.

    Args:
        directory: a Hugging Face, Orbax or Meta checkpoint, or a training run.
        tokenizer: include the tokenizer and its chat templates.
        generation: include generation_config.json.

    Returns:
        Name to path; broken links are included.
    """
    paths: dict[str, Path] = {}
    if generation:
        paths[GENERATION_CONFIG] = directory / GENERATION_CONFIG
    if tokenizer:
        home = tokenizer_home(directory)
        paths |= {name: home / name for name in TOKENIZER_FILES}
        templates = sorted((home / TEMPLATES).glob("*.jinja"))
        paths |= {f"{TEMPLATES}/{path.name}": path for path in templates}
    return {name: path for name, path in paths.items() if path.exists() or path.is_symlink()}


def copy_companions(
    source: Path, directory: Path, *, tokenizer: bool = True, generation: bool = True
) -> list[str]:
    """Copy the companion files of `source` into `directory`, each by a rename once it is complete.

    Companion files that are only in `directory` are removed: they belong to another model.

    Returns:
        The names, in the order of `companion_files`.

    Raises:
        OSError: a file cannot be read or written.
    """
    copied = companion_files(source, tokenizer=tokenizer, generation=generation)
    for name, path in copied.items():
        copy_file(path, directory / name)
    present = companion_files(directory, tokenizer=tokenizer, generation=generation)
    for name, path in present.items():
        if name not in copied and path == directory / name:
            path.unlink()
    return list(copied)
