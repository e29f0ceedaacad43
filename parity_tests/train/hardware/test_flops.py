"""FLOPs of matmuls counted in a traced program."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from llama_jax.attention.masks import AttentionMask
from llama_jax.attention.triton import triton_attention
from train.hardware.flops import matmul_flops

ONE = 2 * 8 * 16 * 32  # of [8, 16] x [16, 32]


def count(function, *shapes, **options) -> float:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return matmul_flops(jax.make_jaxpr(function)(*arrays).jaxpr, **options)


def test_loops_and_branches() -> None:
    def looped(a, b):
        return jax.lax.scan(lambda total, _: (total + a @ b, None), jnp.zeros((8, 32)), length=5)[0]

    def branches(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: 2 * (a @ b) + a @ (b + 1))

    assert count(jnp.matmul, (8, 16), (16, 32)) == ONE
    assert count(looped, (8, 16), (16, 32)) == 5 * ONE
    assert count(branches, (8, 16), (16, 32)) == 2 * ONE


def kernel(loop: bool, estimate: pl.CostEstimate | None):
    """[8, 16] x [16, 32] in each of 3 programs."""

    def body(a_ref, b_ref, out_ref):
        def multiply(index, total):
            return total + a_ref[...] @ b_ref[...]

        if loop:
            # a trip count that is not known when the program is traced
            count = pl.program_id(0) + 1
            out_ref[...] = jax.lax.fori_loop(0, count, multiply, jnp.zeros((8, 32)))
        else:
            out_ref[...] = multiply(0, 0.0)

    return pl.pallas_call(
        body,
        grid=(3,),
        out_shape=jax.ShapeDtypeStruct((8, 32), jnp.float32),
        cost_estimate=estimate,
        interpret=True,
    )


@pytest.mark.parametrize(
    ("loop", "estimate", "share", "expected"),
    [
        (False, None, 1.0, 3 * ONE),
        (False, None, 0.5, 1.5 * ONE),  # the rest of the grid is skipped
        (False, 7, 1.0, 3 * ONE),  # counting is better than an estimate
        (True, 7, 1.0, 7),
        (True, None, 1.0, 3 * ONE),
    ],
)
def test_pallas_kernels(loop: bool, estimate: int | None, share: float, expected: float) -> None:
    cost = None if estimate is None else pl.CostEstimate(estimate, 0, 0)
    run = kernel(loop, cost)
    assert count(run, (8, 16), (16, 32), kernel_share=share) == expected


def test_attention_kernels() -> None:
    """Of the pairs of a query and a key half are visible; two matmuls forward and seven backward."""
    batch, seq, heads, kv_heads, dim = 2, 256, 4, 2, 64

    def attend(*operands):
        return triton_attention(*operands, AttentionMask())

    def gradients(*operands):
        return jax.grad(lambda *a: attend(*a).sum().astype(jnp.float32), (0, 1, 2))(*operands)

    arrays = [
        jax.ShapeDtypeStruct((batch, seq, count, dim), jnp.bfloat16)
        for count in (heads, kv_heads, kv_heads)
    ]
    one = 2 * dim * batch * heads * seq * seq / 2
    assert matmul_flops(jax.make_jaxpr(attend)(*arrays).jaxpr) == 2 * one
    assert matmul_flops(jax.make_jaxpr(gradients)(*arrays).jaxpr) == (2 + 7) * one
