"""numpy arrays as torch tensors, and gradients by torch."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def as_torch(array: np.ndarray) -> Tensor:
    """The array as a tensor that shares its memory; also bfloat16, which torch does not take from numpy."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """torch's dtype of the same name."""
    return as_torch(np.zeros(0, dtype)).dtype


def gradients(
    output: Tensor, x: Tensor, parameters: Mapping[str, Tensor], cotangent: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a scalar, or of `output` with its cotangent: with respect to x, and to every parameter by name."""
    of_x, *rest = torch.autograd.grad(output, [x, *parameters.values()], cotangent)
    return of_x, dict(zip(parameters, rest, strict=True))
