"""Where the tree of arrays is in a directory of checkpoints, and the files that go with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llama_jax.checkpoints.orbax import CHECKPOINTS
from llama_jax.files.foreign_weights import ORBAX_METADATA, ORBAX_TREES


def find_tree(path: Path) -> Path | None:
    """The directory of the tree: `path` itself, one within it, or that of the newest step; None if none.

    Raises:
        ValueError: several of them, none of which is the obvious one.
    """
    if not path.is_dir():
        return None
    if (path / ORBAX_METADATA).is_file():
        return path
    trees = sorted(file.parent for file in path.glob(f"*/{ORBAX_METADATA}"))
    named = [path / name for name in ORBAX_TREES if path / name in trees]
    if len(trees) == 1 or named:
        return named[0] if named else trees[0]
    if trees:
        found = ", ".join(tree.name for tree in trees)
        raise ValueError(f"{path}: found the trees {found}; give one of them")
    if (path / CHECKPOINTS).is_dir():
        return find_tree(path / CHECKPOINTS)
    steps = sorted((int(step.name), step) for step in path.iterdir() if step.name.isdecimal())
    found_trees = (find_tree(step) for _, step in reversed(steps))
    return next((tree for tree in found_trees if tree is not None), None)


def homes(tree: Path) -> Iterator[Path]:
    """Directories that may have a tree's config.json: its own, its step's and its run's."""
    directory = tree.absolute()
    yield directory
    while directory.name in (*ORBAX_TREES, CHECKPOINTS) or directory.name.isdecimal():
        directory = directory.parent
        yield directory


def home_of(path: Path, tree: Path, names: tuple[str, ...]) -> Path | None:
    """The directory, nearest to the tree, that has a file of one of these names."""
    candidates = [*homes(tree)]
    if path.absolute() not in candidates:
        candidates.append(path.absolute())
    return next((home for home in candidates if any((home / n).is_file() for n in names)), None)
