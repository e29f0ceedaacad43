"""GGUF headers: what the gguf library reads we read, and damage is a ValueError, soon."""

from __future__ import annotations

import random
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from convert import convert
from convert.formats.gguf.header import read_header
from parity_tests.convert.formats.gguf.test_tokenizer_read import byte_level_fields
from parity_tests.convert.formats.gguf.tiny_gguf import F16, tiny_gguf, tiny_model

SECONDS, MEMORY = 5.0, 64 * 2**20  # allowed to a damaged file of a hundred kilobytes


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    fields = byte_level_fields("smollm")
    model = tiny_model(vocab_size=len(fields["tokenizer.ggml.tokens"]))
    extra = {"test.ints": [1, 2, 3], "test.floats": [1.5, 2.5], "test.flag": True}
    return tiny_gguf(path, model, type_=F16, fields=fields | extra)


def test_the_header_is_what_the_gguf_library_reads(intact: Path) -> None:
    header = read_header(intact)
    reader = GGUFReader(intact)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == fields
    assert len(header.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert (ours.type, ours.offset) == (tensor.tensor_type, tensor.data_offset)
        assert ours.nbytes == tensor.n_bytes


def attempt(path: Path, destination: Path) -> str | None:
    """Convert a perhaps damaged file within bounds; the error, or None if it went through."""
    started = time.monotonic()
    tracemalloc.start()
    refusal = None
    try:
        convert(path, destination)
    except ValueError as error:
        refusal = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < SECONDS
    assert peak < MEMORY, f"{peak} bytes allocated"
    created = {p.name for p in destination.parent.iterdir()} - {path.name}
    assert created == (set() if refusal is not None else {destination.name})
    assert refusal is None or ("\n" not in refusal and str(path) in refusal)
    shutil.rmtree(destination, ignore_errors=True)
    return refusal


def test_a_file_cut_short_anywhere_is_refused(intact: Path, tmp_path: Path) -> None:
    data = intact.read_bytes()
    damaged = tmp_path / "m.gguf"
    cuts = random.Random(0).sample(range(len(data) - 32), 150)
    for cut in [0, 1, 4, 23, 24, *cuts]:
        damaged.write_bytes(data[:cut])
        assert attempt(damaged, tmp_path / "out") is not None, f"cut at {cut} went through"
        with pytest.raises(ValueError, match=r"too short|cut short or damaged|damaged GGUF header"):
            read_header(damaged)  # found out before any tensor is read


def test_flipped_bytes_in_the_header_are_errors_or_harmless(intact: Path, tmp_path: Path) -> None:
    data = intact.read_bytes()
    end = min(t.offset for t in read_header(intact).tensors.values())
    damaged = tmp_path / "m.gguf"
    rng = random.Random(1)
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 4])):
            broken[rng.randrange(end)] ^= rng.randrange(1, 256)
        damaged.write_bytes(broken)
        refused += attempt(damaged, tmp_path / "out") is not None
    assert refused > 100


def test_every_byte_of_the_counts_and_lengths_may_be_anything(intact: Path, tmp_path: Path) -> None:
    data = intact.read_bytes()
    damaged = tmp_path / "m.gguf"
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    for position in (8, 16, 24, at):  # tensors, metadata entries, a key's length, an array's
        for value in (2**63, 2**64 - 1, 2**40, 2**31, len(data)):
            broken = bytearray(data)
            broken[position : position + 8] = struct.pack("<Q", value)
            damaged.write_bytes(broken)
            refusal = attempt(damaged, tmp_path / "out") or "went through"
            assert "cannot fit in the" in refusal or "expected at most" in refusal


def test_a_tensor_cannot_be_pointed_at_another_ones_data(intact: Path, tmp_path: Path) -> None:
    data = bytearray(intact.read_bytes())
    name = b"blk.1.attn_output.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8 + 4
    data[at : at + 8] = struct.pack("<Q", 0)
    damaged = tmp_path / "m.gguf"
    damaged.write_bytes(data)
    refusal = attempt(damaged, tmp_path / "out") or "went through"
    assert "tensor 'blk.1.attn_output.weight' is at offset 0, expected" in refusal


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"GGML" + bytes(40), "starts with b'GGML', expected b'GGUF'"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "GGUF version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "a big-endian GGUF file"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_an_empty_array_and_an_empty_string_are_allowed(tmp_path: Path) -> None:
    text = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
    text += struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 0)
    text += struct.pack("<Q", 1) + b"b" + struct.pack("<IQ", 8, 0)
    path = tmp_path / "m.gguf"
    path.write_bytes(text)
    assert read_header(path).metadata == {"a": [], "b": ""}


def test_float32_scalars_remember_that_they_are(intact: Path) -> None:
    eps = read_header(intact).metadata["llama.attention.layer_norm_rms_epsilon"]
    assert isinstance(eps, np.float32)
    assert str(eps) == "1e-05"
