"""How many tokens a chunk has, on each platform."""

import pytest

from llama_jax.loss import chunk_size, default_chunk


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("cpu", {32_000: 512, 128_256: 128, 151_936: 128}),
        ("tpu", {32_000: 4096, 128_256: 1024, 128_256 // 8: 8192, 10**7: 128}),
        ("gpu", {32_000: 8192, 128_256: 2048, 128_256 // 8: 16384, 10**7: 128}),
    ],
)
def test_the_platform_decides(monkeypatch, platform, expected):
    monkeypatch.setattr(chunk_size, "target_platform", lambda: platform)
    assert {vocab: default_chunk(vocab) for vocab in expected} == expected


@pytest.mark.parametrize("tokens", [0, 1, 127, 2048, 2049, 4096, 9000, 32768, 100_003])
def test_chunks_are_about_as_full_as_each_other(monkeypatch, tokens):
    monkeypatch.setattr(chunk_size, "target_platform", lambda: "gpu")
    largest = default_chunk(128_256)
    chunk = chunk_size.chunk_size(None, tokens, 128_256)
    chunks = max(-(-tokens // chunk), 1)
    assert 1 <= chunk <= largest
    assert chunks == max(-(-tokens // largest), 1)
    assert chunks * chunk - tokens < 128 * chunks
    assert chunks == 1 or chunk % 128 == 0


def test_a_requested_size_is_kept():
    assert chunk_size.chunk_size(300, 1000, 32_000) == 300
    assert chunk_size.chunk_size(300, 100, 32_000) == 100
