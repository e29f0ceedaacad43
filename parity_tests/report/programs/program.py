"""What the report asks of a program: to run a Llama one layer at a time, forward and backward.

To compare a model of your own, write a class with the methods of `Program` and pass it to `report` in
`parity_tests/report/run.py`. `torch_layers.py` is an example; `test_programs.py` checks that running layer
by layer gives the numbers of the whole model.

Letters in shapes: T tokens, H hidden, D head_dim, V vocabulary. There is one sequence: the batch is 1.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from parity_tests.report.programs.checkpoint import Checkpoint

Steps = dict[str, Tensor]
Gradients = dict[str, Tensor]


class Program(Protocol):
    """A Llama, one layer at a time.

    Arguments and results are torch tensors, whatever the program computes with. Hidden states and
    cotangents are the program's own or, in the backward pass, the oracle's, rounded to the dtype of the
    computation. Each method reads the weights that it needs and drops them: the whole model need never be
    in memory.
    """

    name: str
    """Shown in the report."""

    def mask_and_rotary(self, length: int) -> Steps:
        """`mask`, bool [T, T], true where a query (row) sees a key; `rotary.cos`, `rotary.sin` [T, D]."""

    def embed(self, ids: np.ndarray) -> Tensor:
        """Embeddings [1, T, H] of `ids`, int64 [1, T]."""

    def layer(self, index: int, hidden: Tensor) -> Steps:
        """Run a decoder layer on hidden states [1, T, H].

        Returns its output [1, T, H] as `OUTPUT`, and as many of the other `LAYER_STEPS` [1, T, ...] as the
        program can show; the report compares those that all programs have.
        """

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm, [1, T, H] -> [1, T, H]."""

    def logits(self, hidden: Tensor, block: int) -> Iterator[Tensor]:
        """Logits of normalized hidden states [1, T, H], `block` positions at a time: [<= block, V]."""

    def loss(self, hidden: Tensor, ids: np.ndarray) -> float:
        """Mean cross-entropy of normalized hidden states [1, T, H], each for the next token of `ids`."""

    def head_vjp(self, hidden: Tensor, ids: np.ndarray) -> tuple[Tensor, Gradients]:
        """Gradients of the loss with respect to hidden states [1, T, H] before the final norm, and to the
        weights of the norm and the head, by their names in the checkpoint."""

    def layer_vjp(self, index: int, hidden: Tensor, cotangent: Tensor) -> tuple[Tensor, Gradients]:
        """Gradients with respect to a layer's input [1, T, H] and to its parameters, by their names in the
        layer (`mlp.up_proj.weight`), for the cotangent [1, T, H] of its output."""

    def embed_vjp(self, ids: np.ndarray, cotangent: Tensor) -> Tensor:
        """Gradient [V, H] of the embedding for the cotangent [1, T, H] of its output."""


@runtime_checkable
class CanGenerate(Protocol):
    """A program that can also generate. The report leaves greedy tokens out for one that cannot."""

    def generate(self, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
        """Prompt [1, P] and its greedy continuation [1, P + N], N at most `new_tokens`."""


class Programs(NamedTuple):
    """The program under test, its baseline, and the float64 reference of both."""

    ours: Program
    theirs: Program
    oracle: Program


MakeProgram = Callable[[Checkpoint, np.dtype], Program]
"""A program on a checkpoint's weights; weights and computation in the dtype."""
