"""llama_jax's Llama, one section at a time, in the precision of a recording or in float64.

Needs no torch.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.attention.masks import AttentionMask
from llama_jax.checkpoints import huggingface
from llama_jax.loss import IGNORE_INDEX
from llama_jax.models import causal_lm, decoder, layers
from llama_jax.numerics import matmul
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.jax_steps import decoder_layer, layer_steps
from parity_tests.report.programs.steps import OUTPUT
from parity_tests.traces.names import COS, SIN, input_of, output_of, steps_of
from parity_tests.traces.sections import Inputs, Values

_Arrays = dict[str, jax.Array]

_SMALL = 1_000_000  # elements, of what takes longer to compile than to run
_MANTISSA = {"tf32": 10, "bfloat16": 7, "bfloat16_3x": 15, "float16": 10}


class Precision(NamedTuple):
    """What a program rounds to.

    Attributes:
        parameters: dtype of the weights.
        compute: dtype of weights and activations as they are used.
        operands: to what operands of matmuls are rounded, "float32" for not at all.
        results: to what results of matmuls are rounded, likewise.
    """

    parameters: np.dtype
    compute: np.dtype
    operands: str = "float32"
    results: str = "float32"


class OurSections:
    """llama_jax's modules, with weights of `precision.parameters`, computing in `precision.compute`.

    Args:
        compiled: programs that were compiled for the same model before, and will be; default: none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision,
        inputs: Inputs,
        compiled: dict[Any, Any] | None = None,
    ) -> None:
        self.checkpoint, self.precision, self.inputs = checkpoint, precision, inputs
        self.config, self.dtype = checkpoint.config, jnp.dtype(precision.compute)
        self.layers = self.config.num_hidden_layers
        self.name = "llama_jax" if self.dtype != np.float64 else "llama_jax in float64"
        self._compiled = {} if compiled is None else compiled
        self._model = (repr(self.config), checkpoint.head, repr(precision))

    def forward(self, section: str, values: Values) -> dict[str, np.ndarray]:
        with jax.enable_x64(self.dtype == np.float64):
            steps = self._call(_forward, section, self._arrays(values))
            return {name: np.asarray(value) for name, value in steps.items()}

    def backward(self, section: str, values: Values, cotangents: Values) -> dict[str, np.ndarray]:
        with jax.enable_x64(self.dtype == np.float64):
            arrays = self._arrays(values), self._arrays(cotangents)
            of_steps, of_weights = self._call(_backward, section, *arrays)
            if section == "embedding":
                named = {EMBEDDING: of_weights.weight[...]}
            elif section == "head":
                named = of_weights
            else:
                prefix = f"model.{section}."
                tensors = huggingface.to_hf_tensors(of_weights)
                named = {prefix + name: array for name, array in tensors}
            return {name: np.asarray(array) for name, array in (of_steps | named).items()}

    def _call(self, function: Any, section: str, *arrays: _Arrays) -> Any:
        """Compiled once for all layers: to the program, each of them is layer 0."""
        role, back = section, {}
        if section.startswith("layers."):
            role, before = "layers.0", input_of(section, self.layers)
            assert before is not None
            back = {"embed_tokens": before, role: section}
            back |= dict(zip(steps_of(role), steps_of(section), strict=True))
        to = {name: as_first for as_first, name in back.items()}
        renamed = [{to.get(name, name): a for name, a in group.items()} for group in arrays]
        operands = self._weights(section), self._constants(), *renamed
        shapes = [(array.shape, array.dtype) for array in jax.tree.leaves(operands)]
        key = (self._model, function, role, jax.tree.structure(operands), *shapes)
        if key not in self._compiled:
            with self._rounding():
                program = jax.jit(partial(function, self, role))
                small = sum(array.size for array in jax.tree.leaves(operands)) < _SMALL
                options: dict[str, Any] = FAST_COMPILE if small else {}
                self._compiled[key] = program.lower(*operands).compile(options)
        result = self._compiled[key](*operands)
        steps, *rest = result if isinstance(result, tuple) else (result,)
        steps = {back.get(name, name): array for name, array in steps.items()}
        return (steps, *rest) if rest else steps

    def _weights(self, section: str) -> Any:
        """A module, or arrays by their names in the checkpoint; rounded as the program's are."""
        if section == "embedding":
            module = nnx.eval_shape(
                lambda: decoder.Embedding(self.config, dtype=self.dtype, rngs=nnx.Rngs(0))
            )
            module.weight = nnx.Param(self._weight(EMBEDDING))
            return module
        if section == "head":
            return {name: self._weight(name) for name in (NORM, self.checkpoint.head)}
        index, dtype = int(section.removeprefix("layers.")), self.precision.parameters
        return decoder_layer(self.config, read_layer(self.checkpoint, index, dtype), self.dtype)

    def _weight(self, name: str) -> jax.Array:
        return jnp.asarray(read(self.checkpoint, name, self.precision.parameters), self.dtype)

    def _arrays(self, values: Values) -> _Arrays:
        return {name: jnp.asarray(value, self.dtype) for name, value in values.items()}

    def _constants(self) -> dict[str, jax.Array | None]:
        inputs = self.inputs
        present = inputs._replace(labels=inputs.targets, position_ids=inputs.positions)._asdict()
        count = present.pop("num_items")
        constants = {
            name: None if array is None else jnp.asarray(array, jnp.int32)
            for name, array in present.items()
        }
        wide = matmul.working_dtype(self.dtype)
        return constants | {"num_items": None if count is None else jnp.asarray(count, wide)}

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        """Within, matmuls that are traced round as those of the recording."""
        if (self.precision.operands, self.precision.results) == ("float32", "float32"):
            yield
            return
        rounded = partial(_rounded_einsum, self.precision)
        with ExitStack() as stack:
            for name in ("_plain_einsum", "_blocked_einsum"):
                stack.enter_context(mock.patch.object(matmul, name, rounded))
            jax.clear_caches()  # JAX does not see that the functions have changed
            stack.callback(jax.clear_caches)
            yield


def _rounded_einsum(precision: Precision, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` in float32 of operands with few mantissa bits, as hardware does it."""
    a, b = (_round(x, precision.operands) for x in (a, b))
    return _round(jnp.einsum(spec, a, b, preferred_element_type=a.dtype), precision.results)


def _round(x: jax.Array, to: str) -> jax.Array:
    bits = _MANTISSA.get(to)
    return x if bits is None else jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)


def _forward(
    sections: OurSections, section: str, weights: Any, constants: Any, values: _Arrays
) -> _Arrays:
    return _run(sections, section, weights, values, constants, {})


def _backward(
    sections: OurSections,
    section: str,
    weights: Any,
    constants: Any,
    values: _Arrays,
    cotangents: _Arrays,
) -> tuple[_Arrays, Any]:
    inner = [name for name in cotangents if name != output_of(section)]
    shifts = {name: jnp.zeros_like(cotangents[name]) for name in inner}
    hidden = input_of(section, sections.layers)
    if hidden is not None:
        shifts[hidden] = jnp.zeros_like(values[hidden])

    def run(weights: Any, shifts: _Arrays) -> _Arrays:
        steps = _run(sections, section, weights, values, constants, shifts)
        return {name: steps[name] for name in cotangents}

    steps, pullback = jax.vjp(run, weights, shifts)
    begin = {name: g.reshape(steps[name].shape) for name, g in cotangents.items()}
    begin = {name: g.astype(steps[name].dtype) for name, g in begin.items()}
    of_weights, of_shifts = pullback(begin)
    return of_shifts, of_weights


def _run(
    sections: OurSections,
    section: str,
    weights: Any,
    values: _Arrays,
    constants: Any,
    shifts: _Arrays,
) -> _Arrays:
    """Every step of a section; `shifts` are zeros that are added to steps, to get their gradients."""
    config, ids = sections.config, constants["ids"]

    def read(step: str, value: jax.Array) -> jax.Array:
        if step in shifts:
            known = jax.lax.stop_gradient(values.get(step, value))
            return known.reshape(value.shape) + shifts[step].reshape(value.shape)
        if step in values:  # its gradient flows on to what computed it
            return values[step].reshape(value.shape) + (value - jax.lax.stop_gradient(value))
        return value

    if section == "embedding":
        cos, sin = decoder.rope_cos_sin(
            constants["position_ids"],
            config.rope,
            config.head_size,
            config.max_position_embeddings,
            sections.dtype,
        )
        cos, sin = (jnp.concatenate([half, half], axis=-1) for half in (cos, sin))
        return {"embed_tokens": weights(ids), COS: cos, SIN: sin}
    before = input_of(section, sections.layers)
    assert before is not None
    x = read(before, values[before])
    if section == "head":
        head = weights[sections.checkpoint.head]
        steps = {"norm": layers.rms_norm(x, weights[NORM], config.rms_norm_eps)}
        steps["lm_head"] = layers.linear(read("norm", steps["norm"]), head, None)
        logits = read("lm_head", steps["lm_head"])
        steps["loss"] = _loss(logits, constants["labels"], constants["num_items"])
        return steps
    half = config.head_size // 2
    batch = len(ids)
    cos, sin = (
        jnp.broadcast_to(values[name][..., :half], (batch, x.shape[1], half)) for name in (COS, SIN)
    )
    is_token, segments = constants["attention_mask"], constants["segment_ids"]
    mask = AttentionMask(
        None, None, None if is_token is None else is_token.astype(bool), segments, segments
    )
    steps = {}

    def read_step(name: str, value: jax.Array) -> jax.Array:
        steps[f"{section}.{name}"] = value
        return read(f"{section}.{name}", value)

    output = layer_steps(weights, x, cos, sin, mask, read_step)[OUTPUT]
    return steps | {section: output}


def _loss(logits: jax.Array, labels: jax.Array, count: jax.Array | None) -> jax.Array:
    """Cross-entropy, in float32 or float64: the mean, or the sum divided by `count`."""
    targets = causal_lm.shift_labels(labels)
    counts = targets != IGNORE_INDEX
    log_probabilities = jax.nn.log_softmax(
        logits.astype(matmul.working_dtype(logits.dtype)), axis=-1
    )
    chosen = jnp.take_along_axis(
        log_probabilities, jnp.where(counts, targets, 0)[..., None], axis=-1
    )[..., 0]
    total = -jnp.sum(jnp.where(counts, chosen, 0))
    if count is not None:
        return total / count
    return total / jnp.maximum(jnp.sum(counts), 1).astype(total.dtype)
