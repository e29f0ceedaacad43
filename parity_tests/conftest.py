"""Settings of the whole suite: exact promotion rules, one thread of torch, JAX on the CPU.

`--mutation NAME` breaks the library in one of the ways of `mutations.py` for the whole session. The
suite must then go red; `test_mutations.py` proves it for each of them.
"""

import jax
import pytest
import torch

# An accidental float64 or a silent upcast is an error, not a slower and rounder answer.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_platforms", "cpu")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutation", metavar="NAME", help="break the library in this way; the suite must go red"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: more seeds or more examples; not run by default")


@pytest.fixture(scope="session", autouse=True)
def mutation(request: pytest.FixtureRequest):
    name = request.config.getoption("--mutation")
    if name is None:
        yield
        return
    from parity_tests.mutations import mutate

    with mutate(name):
        yield
