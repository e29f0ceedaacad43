"""Settings of the whole suite: strict promotion, checked shapes, one thread of torch, JAX on the CPU.

`--mutation NAME` breaks the library in one of the ways of `mutations.py` for the whole session. The
suite must then go red; `test_mutations.py` proves it for each of them.
"""

import jax
import pytest
import torch
from jaxtyping import install_import_hook

# An accidental float64 or a silent upcast is an error, not a slower and rounder answer.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A row that meets a matrix by accident is one too.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
torch.set_num_threads(1)

# The shapes and dtypes in the annotations of the numerics are checked as the suite runs. Not those of
# the public surface, which answers a wrong argument with an error of its own.
CHECKED = (
    *(f"attention.{name}" for name in ("dispatch", "blocked", "cudnn", "plain", "splash")),
    *(
        "attention.cache",
        "attention.masks",
        "evaluation.scoring",
        "models.layers",
        "models.task_head",
    ),
    *("loss.chunk", "loss.reduction", "loss.reference", "loss.scan"),
    *("numerics.matmul", "numerics.rope"),
)
install_import_hook([f"llama_jax.{module}" for module in CHECKED], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutation", metavar="NAME", help="break the library in this way; the suite must go red"
    )


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--mutation")
    if name is not None:
        from parity_tests.harness.mutations import MUTATIONS

        if name not in MUTATIONS:
            raise pytest.UsageError(f"--mutation: found {name!r}, expected {', '.join(MUTATIONS)}")


@pytest.fixture(scope="session", autouse=True)
def mutation(request: pytest.FixtureRequest):
    name = request.config.getoption("--mutation")
    if name is None:
        yield
        return
    from parity_tests.harness.mutations import mutate

    with mutate(name):
        yield
