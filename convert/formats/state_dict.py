"""A file that a program made with `torch.save`: a state dict, alone or in a training checkpoint.

torchtitan's consolidated weights, `dcp_to_torch_save`, `torch.save(model.state_dict())`. The config.json,
or Meta's params.json, is the one beside the file.
"""

from __future__ import annotations

from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.formats.torch_files import OLD_FORM_NOTE, open_torch_file
from convert.formats.trainer_state import model_of
from convert.renaming import Rename

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def recognizes(path: Path) -> bool:
    """Whether it looks like one: a file of PyTorch's."""
    return path.is_file() and path.suffix in _SUFFIXES


def read(path: Path, *, tokenizer: bool = True, rename: Rename | None = None) -> Checkpoint:
    """The Llama in a file of `torch.save`, in torchtitan's or Hugging Face's names, whatever is beside it.

    Args:
        tokenizer: whether to read the one beside the file; if not, errors in it do not matter.
        rename: what is done to the stored names first.

    Raises:
        ValueError: with every problem: a damaged file, a pickle that asks for anything but tensors, tensors
            that are missing, unexpected or misshapen, no config beside it, and torch not installed.
    """
    try:
        file = open_torch_file(path, tree=True)
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from None
    return model_of(
        path,
        title="PyTorch state dict",
        homes=[path.parent],
        stored=file.tensors,
        load=file.load,
        weight_files=[path],
        tokenizer=tokenizer,
        rename=rename,
        notes=[f"{path.name} {OLD_FORM_NOTE}"] if file.in_memory else [],
    )
