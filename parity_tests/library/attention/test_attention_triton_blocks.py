"""Which blocks the Triton kernels visit, and in which of them they mask nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.attention.masks import AttentionMask, dense_mask
from llama_jax.attention.triton.blocks import Kernels, default_kernels
from llama_jax.attention.triton.ranges import Visible, mask_operands, ranges, visible_blocks
from parity_tests.library.attention.triton_cases import BATCH, KINDS, SMALL, mask_of

SEQ = 8192
GPUS = ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"]


def packed(lengths: list[int], is_token: int | None = None) -> AttentionMask:
    """One row of documents; tokens from `is_token` on are padding."""
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
    tokens = None if is_token is None else jnp.asarray(np.arange(ids.size)[None] < is_token)
    return AttentionMask(None, None, tokens, jnp.asarray(ids), jnp.asarray(ids))


def visits(mask: AttentionMask, kernels: Kernels, seq: int = SEQ) -> dict[str, np.ndarray]:
    """What each kernel reads to know its loops: [batch, programs, 4]."""
    operands = mask_operands(kernels, 1, seq, seq, mask)
    result = {}
    for name, blocks in zip(("forward", "d_query", "d_key_value"), kernels[:3], strict=True):
        visible = visible_blocks(operands, blocks.queries, blocks.keys)
        if name == "d_key_value":
            visible = Visible(*(array.swapaxes(1, 2) for array in visible))
        result[name] = np.asarray(ranges(visible))
    return result


def visited_pairs(mask: AttentionMask, kernels: Kernels) -> dict[str, int]:
    """Pairs of a query and a key in the blocks that the programs of one head visit."""
    return {
        name: int((bounds[..., 3] - bounds[..., 0]).sum())
        * getattr(kernels, name).queries
        * getattr(kernels, name).keys
        for name, bounds in visits(mask, kernels).items()
    }


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_blocks_of_other_documents_are_not_visited(dim, gpu):
    """64 documents of 128 tokens cost at most a sixteenth of one of 8192, in every kernel."""
    kernels = default_kernels(dim, gpu)
    one, many = (visited_pairs(mask, kernels) for mask in (AttentionMask(), packed([128] * 64)))
    for name, pairs in one.items():
        # half of the square, and the diagonal
        assert SEQ**2 / 2 < pairs < SEQ**2 / 2 * 1.02
        assert many[name] * 16 <= pairs
        assert many[name] <= 64 * 128**2


@pytest.mark.parametrize("seed", range(3))
def test_documents_of_uneven_lengths(seed):
    """No more than the blocks that their triangles touch."""
    cuts = np.random.default_rng(seed).choice(np.arange(1, SEQ), 20, replace=False)
    lengths = np.diff([0, *np.sort(cuts), SEQ])
    triangles = (lengths.astype(float) ** 2 / 2).sum()
    # along its diagonal, its first column and its last row a document touches blocks in part
    edges = 2.5 * 128 * lengths.sum()
    for pairs in visited_pairs(packed(list(lengths)), default_kernels(128)).values():
        assert triangles <= pairs <= triangles + edges


def test_padding_at_the_end_is_not_visited():
    tokens = SEQ // 4
    padded = visits(packed([SEQ], is_token=tokens), default_kernels(128))
    for name in ("forward", "d_query"):
        assert padded[name][..., 3].max() * getattr(default_kernels(128), name).keys == tokens
    key_blocks = padded["d_key_value"]
    count = tokens // default_kernels(128).d_key_value.keys
    assert np.all(key_blocks[:, count:] == 0)
    assert np.all(key_blocks[:, :count, 3] > 0)


def test_of_a_long_document_nothing_but_the_diagonal_is_masked():
    for name, bounds in visits(packed([SEQ]), default_kernels(128)).items():
        masked = bounds[..., 3] - bounds[..., 0] - (bounds[..., 2] - bounds[..., 1])
        assert masked.max() <= 2, name


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_hold_every_visible_pair_and_full_ones_no_other(kind):
    """In any order of segments."""
    seq = 96
    mask = mask_of(kind, seq)
    dense = np.broadcast_to(np.asarray(dense_mask(mask, seq, seq))[:, 0], (BATCH, seq, seq))
    operands = mask_operands(SMALL, BATCH, seq, seq, mask)
    for blocks in SMALL[:3]:
        visible = visible_blocks(operands, blocks.queries, blocks.keys)
        by_block = dense.reshape(BATCH, seq // blocks.queries, blocks.queries, -1, blocks.keys)
        some, every = by_block.any((2, 4)), by_block.all((2, 4))
        assert not np.any(some & ~np.asarray(visible.some))
        assert not np.any(~every & np.asarray(visible.all))
        require_ranges(some, every, np.asarray(ranges(visible)))
        transposed = Visible(*(array.swapaxes(1, 2) for array in visible))
        require_ranges(some.swapaxes(1, 2), every.swapaxes(1, 2), np.asarray(ranges(transposed)))


def require_ranges(some, every, bounds):
    bounds = np.broadcast_to(bounds, (BATCH, *bounds.shape[1:]))
    column = np.arange(some.shape[2])
    first, full_first, full_end, end = (bounds[..., i, None] for i in range(4))
    assert np.all((first <= full_first) & (full_first <= full_end) & (full_end <= end))
    assert not np.any(some & ((column < first) | (column >= end)))
    assert not np.any(~every & (column >= full_first) & (column < full_end))


def test_a_cache_is_visited_as_far_as_it_is_filled():
    """A prefill of 256 tokens after 512, in a cache of 8192 slots."""
    slots = jnp.arange(SEQ, dtype=jnp.int32)
    filled, none = (slots < 768)[None], jnp.zeros((1, 256), jnp.int32)
    mask = AttentionMask(slots[512:768], slots, filled, none, jnp.zeros((1, SEQ), jnp.int32))
    kernels = default_kernels(128)
    operands = mask_operands(kernels, 1, 256, SEQ, mask)
    bounds = np.asarray(ranges(visible_blocks(operands, 128, 64)))
    assert bounds.tolist() == [[[0, 0, 8, 10], [0, 0, 10, 12]]]


@pytest.mark.parametrize(
    ("kind", "like"),
    [
        ("NVIDIA H200", "H100"),
        ("NVIDIA GH200 480GB", "H100"),
        ("NVIDIA B200", "H100"),
        ("NVIDIA GB300", "H100"),
        ("NVIDIA A10G", "A100"),
        ("NVIDIA GeForce RTX 4090", "A100"),
        ("NVIDIA GB10", "A100"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "A100"),
    ],
)
def test_larger_blocks_are_for_gpus_with_room_for_them(kind, like):
    for dim in (96, 256):
        assert default_kernels(dim, kind) == default_kernels(dim, f"NVIDIA {like}")
        assert default_kernels(dim, "NVIDIA H100") != default_kernels(dim, "NVIDIA A100")
