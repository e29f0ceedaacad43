"""Quantize a model by what its matrices multiply with on a text, one layer after the other."""

from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.inputs.ids import require_ids
from llama_jax.models.decoder import LlamaModel, mask_and_cache
from llama_jax.models.layers import DecoderLayer, LayerCall, Linear
from llama_jax.numerics.matmul import working_dtype
from llama_jax.numerics.rope import rope_cos_sin
from llama_jax.quantization.compensation import compensated, compensation
from llama_jax.quantization.model import MatrixToQuantize, matrices_to_quantize
from llama_jax.quantization.weight import QuantizedWeight, Stored

Model = TypeVar("Model", bound=nnx.Module)

_Path = tuple[str, str]  # of a projection in a layer: the module that has it, and its name there


def quantize_calibrated(
    model: Model,
    input_ids: Int[Array, "rows seq"] | Int[np.ndarray, "rows seq"],
    bits: int,
    group_size: int | None = None,
    vocabulary: bool = True,
    *,
    symmetric: bool = False,
) -> Model:
    """`quantize`, with codes that change the projections' outputs on a text least (GPTQ).

    A layer is quantized by what the quantized layers before it make of the text. Its cost is that of
    running the text three times, and of four Cholesky factorizations of second moments, [in, in] in
    float32, which are held for one layer at a time. The embedding and the head are rounded.

    Args:
        model: a causal model, another with a decoder, or the decoder; it is not changed.
        input_ids: some ten thousand tokens of text that is like what the model is for.
        bits: 8 or 4.
        group_size: see `quantize`, as for the next two.
        vocabulary: round the embedding and the head, too.
        symmetric: 4 bits without a zero.

    Raises:
        ValueError: those of `quantize`, and ids that are not [rows, seq], outside the vocabulary, or in
            rows of more than `max_position_embeddings`.

    Examples:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaForCausalLM, quantize_calibrated
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
        >>> text = np.random.default_rng(0).integers(0, 32, (4, 16))
        >>> small = quantize_calibrated(model, text, bits=4, group_size=4)
        >>> small.generate([[5, 6, 7]], max_new_tokens=2, eos_token_id=()).shape
        (1, 5)
    """
    copy = nnx.merge(*nnx.split(model))
    decoder = copy if isinstance(copy, LlamaModel) else getattr(copy, "model", None)
    if not isinstance(decoder, LlamaModel):
        raise ValueError(f"model: found {type(model).__name__}, expected one with a decoder")
    ids = np.asarray(input_ids)
    longest = decoder.config.max_position_embeddings
    if ids.ndim != 2 or 0 in ids.shape or ids.shape[1] > longest:
        raise ValueError(
            f"input_ids: found shape {ids.shape}, expected [rows, seq] with seq of 1 to {longest}"
        )
    require_ids("input_ids", ids, decoder.config.vocab_size)
    layers = decoder.layers
    assert isinstance(layers, DecoderLayer), "only decoding unstacks layers"
    path_of = {id(linear): path for path, linear in _linears(layers)}
    plans: dict[_Path, MatrixToQuantize] = {}
    for plan in matrices_to_quantize(copy, bits, group_size, vocabulary):
        if id(plan.module) in path_of:
            plans[path_of[id(plan.module)]] = plan
        else:
            weight = plan.module.weight
            plan.module.weight = QuantizedWeight(weight, plan.bits, plan.group_size, symmetric)

    def quantized(path: _Path, weight: nnx.Param[Array], stored: Stored) -> Any:
        plan = plans[path]
        return QuantizedWeight(weight, plan.bits, plan.group_size, symmetric, stored)

    rounded: dict[_Path, list[Stored]] = {path: [] for path in plans}
    structure, stacked = nnx.split(layers)
    hidden = decoder.embed_tokens(jnp.asarray(ids, jnp.int32))
    call = _call(decoder, ids.shape[1])
    for index in range(decoder.config.num_hidden_layers):
        state = jax.tree.map(itemgetter(index), stacked)
        layer = nnx.merge(structure, state)
        linears = dict(_linears(layer))
        for paths, moments in _moments(structure, state, hidden, call).items():
            how = compensation(np.asarray(moments, np.float64))
            for path in paths:
                linear, plan = linears[path], plans[path]
                stored = compensated(
                    linear.weight[...], how, plan.bits, plan.group_size, symmetric=symmetric
                )
                rounded[path].append(stored)
                linear.weight = quantized(path, linear.weight, stored)
        hidden = _run(*nnx.split(layer), hidden, call)
    for path, plan in plans.items():
        codes = tuple(jnp.stack(parts) for parts in zip(*rounded[path], strict=True))
        plan.module.weight = quantized(path, plan.module.weight, codes)
    return copy


class _Observed(Linear):
    """A projection that passes on what it is called with."""

    def __init__(self, linear: Linear, observe: Callable[[Array], None]):
        self._linear, self._observe, self.slices = linear, observe, linear.slices

    def __call__(self, x: Array, reduce_dtype: DTypeLike | None = None) -> Array:
        self._observe(x)
        return self._linear(x, reduce_dtype)


def _linears(layer: DecoderLayer) -> Iterator[tuple[_Path, Linear]]:
    """The projections of a layer, or of all in one."""
    for parent in ("self_attn", "mlp"):
        for name, module in vars(getattr(layer, parent)).items():
            if isinstance(module, Linear):
                yield (parent, name), module


def _call(decoder: LlamaModel, seq: int) -> LayerCall:
    """Of one row without padding."""
    config = decoder.config
    cos, sin = rope_cos_sin(
        jnp.arange(seq, dtype=jnp.int32)[None],
        config.rope,
        config.head_size,
        config.max_position_embeddings,
        decoder.dtype,
    )
    return LayerCall(cos, sin, mask_and_cache(1, seq, None, None, None)[0])


@partial(jax.jit, static_argnums=0)
def _moments(
    structure: Any, state: Any, hidden: Float[Array, "rows seq hidden"], call: LayerCall
) -> dict[tuple[_Path, ...], Float[Array, "in in"]]:
    """For the projections of a layer that read the same, the sum of x_i x_j over their inputs x."""

    def add_row(sums: Any, row: Float[Array, "seq hidden"]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of_row(row)), None

    def of_row(row: Float[Array, "seq hidden"]) -> dict[tuple[_Path, ...], Float[Array, "in in"]]:
        layer = nnx.merge(structure, state)
        inputs: dict[_Path, Array] = {}
        for path, linear in tuple(_linears(layer)):
            parent, name = path
            observed = _Observed(linear, partial(inputs.__setitem__, path))
            setattr(getattr(layer, parent), name, observed)
        layer(row[None], call)
        readers: dict[int, list[_Path]] = {}
        for path, x in inputs.items():
            readers.setdefault(id(x), []).append(path)
        return {tuple(paths): _moments_of(inputs[paths[0]][0]) for paths in readers.values()}

    sums, _ = jax.lax.scan(add_row, of_row(hidden[0]), hidden[1:])
    return sums


def _moments_of(x: Float[Array, "seq in"]) -> Float[Array, "in in"]:
    wide = x.astype(working_dtype(x.dtype))
    return jnp.einsum("ti,tj->ij", wide, wide)


@partial(jax.jit, static_argnums=0)
def _run(
    structure: Any, state: Any, hidden: Float[Array, "rows seq hidden"], call: LayerCall
) -> Float[Array, "rows seq hidden"]:
    layer = nnx.merge(structure, state)
    return jax.lax.map(lambda row: layer(row[None], call).hidden[0], hidden)
