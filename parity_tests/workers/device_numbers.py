"""What the kernels, the loss, the training step and generation compute on JAX's default device.

Run by `test_gpu.py` on a GPU and, with small shapes, on the CPU. Prints one JSON object with the parts that
are named on the command line. Inputs are made by numpy, so that they are the same on every platform.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.attention.cudnn import cudnn_attention
from llama_jax.attention.masks import AttentionMask, dense_mask
from llama_jax.attention.plain import dot_product_attention
from llama_jax.attention.triton import triton_attention
from llama_jax.attention.triton.blocks import default_kernels
from llama_jax.loss import fused_linear_cross_entropy
from train.data.batch import Batch
from train.options import ModelOptions, RunOptions
from train.program.build import run_program

CONFIG = LlamaConfig(
    vocab_size=199,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    eos_token_id=None,
    pad_token_id=0,
)


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def rms_errors(values: Any, exact: Any) -> list[float]:
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(exact), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return [float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in wide]


def cast(arrays: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), arrays)


# attention ---------------------------------------------------------------------------------------


def attention_errors(small: bool) -> dict[str, dict[str, list[float]]]:
    """Of the output and three gradients against float64: the kernel's, and the plain formula's."""
    seq = 72 if small else 1000  # which no block divides
    shapes = [(4, 2, 64)] if small else [(8, 2, 64), (8, 8, 128), (8, 1, 128), (4, 2, 256)]
    dtypes = (jnp.bfloat16,) if small else (jnp.bfloat16, jnp.float16)
    rng = np.random.default_rng(0)
    documents = jnp.asarray(np.sort(rng.integers(0, 5, (2, seq)), axis=1), jnp.int32)
    is_token = jnp.arange(seq) < jnp.asarray([[seq], [seq - seq // 5]])
    packed = AttentionMask(None, None, is_token, documents, documents)
    results = {}
    for heads, kv_heads, dim in shapes:
        sizes = [(2, seq, count, dim) for count in (heads, kv_heads, kv_heads, heads)]
        arrays = [rng.normal(size=size) for size in sizes]
        kernels = default_kernels(dim)._replace(interpret=not on_gpu())
        cases: dict[str, tuple[AttentionMask, Callable[..., Any]]] = {
            "triton": (packed, lambda *a, k=kernels: triton_attention(*a, packed, k))
        }
        if on_gpu() and dim <= 128:
            cases["cudnn"] = AttentionMask(), lambda *a: cudnn_attention(*a, AttentionMask())
        for name, (mask, kernel) in cases.items():

            def formula(q: Any, k: Any, v: Any, mask: AttentionMask = mask) -> Any:
                return dot_product_attention(q, k, v, dense_mask(mask, seq, seq))[0]

            for dtype in dtypes:
                # what the kernel gets, rounded already
                rounded = cast(arrays, dtype)
                with jax.enable_x64(True):
                    exact = gradients(formula, cast(rounded, jnp.float64))
                results[f"{name} {heads}/{kv_heads} x {dim} {jnp.dtype(dtype)}"] = {
                    "kernel": rms_errors(gradients(kernel, rounded), exact),
                    "formula": rms_errors(gradients(formula, rounded), exact),
                }
    return results


def gradients(run: Callable[..., Any], arrays: Any) -> list[np.ndarray]:
    """The output and the gradients of its product with the last array, as numpy arrays."""

    @jax.jit
    def both(*arrays: Any) -> Any:
        *operands, cotangent = arrays
        out, pull = jax.vjp(run, *operands)
        return out, pull(cotangent)

    return [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(both(*arrays))]


# loss --------------------------------------------------------------------------------------------


def loss_errors(small: bool) -> dict[str, dict[str, list[float]]]:
    """Of the loss and both gradients against float64: the fused loss's, and plain JAX's."""
    tokens, hidden, vocab = (60, 32, 211) if small else (1000, 512, 32003)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(tokens, hidden)), rng.normal(size=(vocab, hidden)) / hidden**0.5]
    labels = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    results = {}
    for dtype in (jnp.float32, jnp.bfloat16):

        def loss_of(mode: str) -> Callable[..., Any]:
            def loss(h: Any, k: Any) -> Any:
                return fused_linear_cross_entropy(h, k, labels, chunk=None, mode=mode).loss

            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

        rounded = cast(arrays, dtype)
        with jax.enable_x64(True):
            exact = loss_of("reference")(*cast(rounded, jnp.float64))
            exact = jax.tree.map(np.asarray, exact)
        results[str(jnp.dtype(dtype))] = {
            "fused": rms_errors(loss_of("auto")(*rounded), exact),
            "plain": rms_errors(loss_of("reference")(*rounded), exact),
        }
    return results


# training and generation -------------------------------------------------------------------------


def numpy_params(abstract: Any) -> Any:
    """Parameters like `abstract`: norms near 1, everything else small."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> np.ndarray:
        values = 0.08 * rng.standard_normal(leaf.shape, np.float32)
        is_norm = leaf.shape[-1] == CONFIG.hidden_size and leaf.size <= 2 * CONFIG.hidden_size
        return (values + is_norm).astype(leaf.dtype)

    return jax.tree.map(fill, abstract)


def training(small: bool) -> dict[str, Any]:
    """Losses, gradient norms and the SHA-256 of the parameters after a few deterministic steps."""
    rows, seq = (2, 160) if small else (4, 512)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (1, rows, seq)).astype(np.int32)
    documents = np.sort(rng.integers(0, 4, ids.shape), axis=-1).astype(np.int32)
    positions = np.broadcast_to(np.arange(seq, dtype=np.int32), ids.shape)
    batch = Batch(ids, np.roll(ids, -1, -1), documents, positions)
    results: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        options = RunOptions(
            steps=4,
            batch_size=rows,
            sequence_length=seq,
            deterministic=True,
            model=ModelOptions(compute_dtype=dtype),
        )
        program = run_program(options, CONFIG, jax.devices()[:1])
        with jax.set_mesh(program.mesh), jax.default_matmul_precision("highest"):
            params = jax.device_put(numpy_params(program.params))
            state = jax.jit(program.optimizer.init)(params)
            losses, norms = [], []
            for _ in range(4):
                params, state, metrics = program.step(params, state, batch, None)
                losses.append(float(metrics.loss))
                norms.append(float(metrics.grad_norm))
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(params):
            digest.update(np.asarray(leaf).tobytes())
        results[dtype] = {"loss": losses, "norm": norms, "digest": digest.hexdigest()}
    return results


def generation(small: bool) -> dict[str, Any]:
    """Logits of a prefill and greedy tokens after it, of rows with padding on the left."""
    length, new = (140, 6) if small else (300, 24)
    rng = np.random.default_rng(1)
    ids = rng.integers(1, CONFIG.vocab_size, (2, length)).astype(np.int32)
    is_token = np.arange(length) >= np.asarray([[0], [length // 4]])
    results: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        abstract = nnx.eval_shape(
            lambda dtype=dtype: LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
        )
        graphdef, state = nnx.split(abstract)
        model = nnx.merge(graphdef, jax.device_put(numpy_params(nnx.to_pure_dict(state))))
        mask = jnp.asarray(is_token, jnp.int32)
        with jax.default_matmul_precision("highest"):
            logits = jax.jit(lambda model, mask=mask: model(ids, attention_mask=mask).logits)(model)
            tokens = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        results[dtype] = {
            "logits": np.asarray(logits[:, -1], np.float64).tolist(),
            "tokens": np.asarray(tokens).tolist(),
        }
    return results


PARTS = {
    "attention": attention_errors,
    "loss": loss_errors,
    "training": training,
    "generation": generation,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    results: dict[str, Any] = {name: PARTS[name](arguments.small) for name in arguments.parts}
    print("\n" + json.dumps(results | {"device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    main()
