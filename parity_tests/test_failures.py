"""What a command says of a failure that is not its user's, and under JAX's own settings."""

import importlib

import jax
import pytest

from llama_jax.failures import failure_line

UNIMPLEMENTED = jax.errors.JaxRuntimeError(
    "UNIMPLEMENTED: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32\nat x.cc:1"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nstack"
            ),
            "not enough memory: RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.",
        ),
        (MemoryError("cannot allocate"), "not enough memory: cannot allocate"),
        (MemoryError(), "not enough memory"),
        (OverflowError("int too large"), "a size out of range: int too large"),
        (
            UNIMPLEMENTED,
            "JAX's backend failed: UNIMPLEMENTED: Unsupported element type for DotThunk::Execute: "
            "BF16 x BF16 = F32",
        ),
        (jax.errors.JaxRuntimeError(), "JAX's backend failed: JaxRuntimeError"),
    ],
)
def test_memory_is_blamed_only_where_it_ran_out(error, line):
    assert failure_line(error) == line


@pytest.mark.parametrize(
    ("program", "place", "arguments"),
    [
        ("llama_jax", "_info", ["info", "llama3-8b"]),
        ("parity_tests", "_report", ["report", "DIR"]),
        ("convert", "_convert", ["A", "B"]),
        ("train", "_with_saved_flags", ["eval", "A"]),
    ],
)
@pytest.mark.parametrize("error", [UNIMPLEMENTED, MemoryError("of 3 GB")])
def test_every_command_says_it_in_one_line(program, place, arguments, error, monkeypatch, capsys):
    module = importlib.import_module(f"{program}.__main__")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, place, fail)
    assert module.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert failure_line(error) in said
