"""Settings for all tests: strict promotion, shape checks, one torch thread, JAX on the CPU.

`--mutation NAME` runs the session with one of the deliberate mistakes of `harness/mutations.py`. The suite
must then fail.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
import torch
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

from llama_jax.numerics.xla_options import leave_loops_rolled

# An accidental float64 or a silent upcast is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# So is an accidental broadcast of a vector over a matrix.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
# Tests compare runs of this process and of others, bit for bit.
leave_loops_rolled()
torch.set_num_threads(1)
# No test reaches the network; those of the Hub have one of their own.
os.environ["HF_HUB_OFFLINE"] = "1"
# Commands read and write no other compiled programs than those of `compiled_programs`.
os.environ["LLAMA_JAX_CACHE"] = ""

# Shapes and dtypes in the annotations of these modules are checked in every call. Not those of the public
# API, which raises its own errors for wrong arguments.
CHECKED = (
    *(f"attention.{name}" for name in ("dispatch", "blocked", "cudnn", "plain", "splash")),
    *(f"attention.triton.{name}" for name in ("attention", "kernels", "ranges")),
    *(
        "attention.cache",
        "attention.masks",
        "evaluation.scoring",
        "models.layers",
        "models.task_head",
    ),
    *("loss.chunk", "loss.reduction", "loss.reference", "loss.scan", "loss.statistics"),
    *("numerics.few_rows", "numerics.matmul", "numerics.rope"),
)
if (
    find_spec("beartype") is not None
):  # an environment of somebody else's, for `make gpu`, may lack it
    install_import_hook([f"llama_jax.{module}" for module in CHECKED], "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mutation", metavar="NAME", help="run with this deliberate mistake; the suite must fail"
    )


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--mutation")
    if name is not None:
        from parity_tests.harness.mutations import MUTATIONS

        if name not in MUTATIONS:
            raise pytest.UsageError(f"--mutation: found {name!r}, expected {', '.join(MUTATIONS)}")


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs are kept that took long to compile: other tests, and child processes, have many again.

    Of this process: JAX does not lock the folder.
    """
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()  # where importing a module has compiled something, it is off
    return folder


@pytest.fixture(scope="session", autouse=True)
def mutation(request: pytest.FixtureRequest):
    name = request.config.getoption("--mutation")
    if name is None:
        yield
        return
    from parity_tests.harness.mutations import mutate

    with mutate(name):
        yield
