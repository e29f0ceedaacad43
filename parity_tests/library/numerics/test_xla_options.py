"""XLA's options: the user's own flags win, and the compilers accept every one."""

import json
import os

import jax
import pytest

from llama_jax.numerics.xla_options import (
    DETERMINISTIC,
    GPU_MEMORY_FRACTION,
    STEP_OPTIONS,
    STEP_OPTIONS_ACROSS_HOSTS,
    leave_loops_rolled,
    reserve_gpu_memory,
    reserve_host_threads,
    step_compiler_options,
)
from parity_tests.harness.child_process import output_lines

FRACTION, OLD_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
# XLA renamed it between the versions of jax 0.11.0 and 0.11.1
OLD_PIPELINED = "xla_gpu_enable_pipelined_all_gather"
PIPELINED = "xla_gpu_pipeline_all_gather" if jax.__version_info__ >= (0, 11, 1) else OLD_PIPELINED


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", FRACTION, OLD_FRACTION):
        monkeypatch.delenv(name, raising=False)


def test_the_platform_of_the_process_is_the_default():
    assert step_compiler_options() == step_compiler_options("cpu") == STEP_OPTIONS["cpu"]


def test_across_hosts_there_are_more():
    within, across = (step_compiler_options("gpu", across_hosts=on) for on in (False, True))
    assert within == STEP_OPTIONS["gpu"]
    assert across == within | STEP_OPTIONS_ACROSS_HOSTS["gpu"] != within


@pytest.mark.parametrize(
    "flags",
    [f"--{PIPELINED}=false", f"--xla_dump_to=/x  --{PIPELINED}", f"--{OLD_PIPELINED}=true"],
)
def test_what_the_user_sets_is_left_alone(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    expected = {name: value for name, value in STEP_OPTIONS["gpu"].items() if name != PIPELINED}
    assert step_compiler_options("gpu") == expected


def test_the_arguments_of_libtpu_are_the_users_flags_too(monkeypatch):
    monkeypatch.setitem(STEP_OPTIONS, "tpu", {"xla_tpu_a": True, "xla_b": 1})
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_a=false")
    assert step_compiler_options("tpu") == {"xla_b": 1}


@pytest.mark.parametrize(("platform", "added"), [("gpu", DETERMINISTIC["gpu"]), ("cpu", {})])
def test_only_a_gpu_needs_an_option_for_determinism(platform, added):
    options = step_compiler_options(platform, deterministic=True)
    assert options == step_compiler_options(platform) | added


def test_memory_is_reserved_unless_the_user_did(monkeypatch):
    for name in (FRACTION, OLD_FRACTION):
        monkeypatch.setenv(name, "0.5")
        reserve_gpu_memory()
        chosen = {key: os.environ.get(key) for key in (FRACTION, OLD_FRACTION)}
        assert chosen == {FRACTION: None, OLD_FRACTION: None} | {name: "0.5"}
        monkeypatch.delenv(name)
    monkeypatch.setenv(FRACTION, "")  # so that it is restored
    monkeypatch.delenv(FRACTION)
    reserve_gpu_memory()
    assert os.environ[FRACTION] == str(GPU_MEMORY_FRACTION)


@pytest.mark.parametrize(
    ("flags", "chosen", "threads"),
    [
        ("--xla_force_host_platform_device_count=8", None, "32"),
        ("--xla_force_host_platform_device_count=8", "9", "9"),
        ("", None, None),
    ],
)
def test_threads_for_devices_made_of_the_cpu(monkeypatch, flags, chosen, threads):
    import os

    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NPROC", chosen or "")
    if chosen is None:
        monkeypatch.delenv("NPROC")
    reserve_host_threads()
    assert os.environ.get("NPROC") == threads


@pytest.mark.parametrize("flags", ["", "--xla_cpu_enable_fast_math=false"])
def test_loops_are_not_unrolled(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    leave_loops_rolled()
    leave_loops_rolled()
    rolled = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=true"
    assert os.environ["XLA_FLAGS"].split() == [*flags.split(), rolled]


def test_options_of_the_user_for_a_backend_stay(monkeypatch):
    flags = "--xla_backend_extra_options=xla_cpu_optimize_for_size=true"
    monkeypatch.setenv("XLA_FLAGS", flags)
    leave_loops_rolled()
    assert os.environ["XLA_FLAGS"] == flags


def test_the_options_have_the_names_of_this_version():
    """jaxlib refuses others before it compiles, for a CPU as well."""
    options = step_compiler_options("gpu", across_hosts=True, deterministic=True)
    assert PIPELINED in options
    jax.jit(lambda x: x, compiler_options=options).lower(1.0).compile()


@pytest.mark.parametrize("topology", ["h100:2x2", "v5p:2x2x1"])
def test_the_compilers_know_every_option(topology):
    """They refuse unknown ones; compiled for devices that are not here."""
    result = json.loads(output_lines("workers.compiler_options", topology)[-1])
    if "missing" in result:
        pytest.skip(result["missing"])
    assert result["compiled"]
