"""Measure the activations of a model in its first training steps."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llama_jax.config import LlamaConfig
from llama_jax.numerics.matmul import einsum, working_dtype
from train.data.batch import Batch
from train.data.placement import placed_batches
from train.data.tokens import Source
from train.options import RunOptions
from train.program.activation_statistics import activation_statistics
from train.program.build import (
    Program,
    initial_opt_state,
    initial_params,
    model_of,
    run_program,
)
from train.run.training_data import training_windows

# measured on so many tokens, whose logits are held
_TOKENS = 1024


def measure(
    options: RunOptions, config: LlamaConfig, sources: Sequence[Source], seeds: int
) -> dict[str, Float[np.ndarray, " steps_and_1"]]:
    """The root mean square of activations before the first step and after each, by name.

    Those of the embedding; of each layer the residual stream and the attention logits; the logits, and how
    much they have changed since before the first step. All are of rows of the first batch, and every step
    is taken on this batch: with other tokens in each, what a step adds to an activation is less the
    shared direction that muP is about, in proportion to the width n, and more a random sum, sqrt(n).

    Args:
        seeds: how many seeds, from that of the options on, to take the geometric mean over.
    """
    program = run_program(options, config, jax.devices()[:1])
    compute_dtype = jnp.dtype(options.model.compute_dtype or options.model.parameter_dtype)
    observe = jax.jit(_make_observe(program, compute_dtype))
    logarithms = []
    with jax.set_mesh(program.mesh):
        for seed in range(options.seed, options.seed + seeds):
            measured = _measure(program, observe, replace(options, seed=seed), sources)
            with np.errstate(divide="ignore"):
                logarithms.append(np.log(measured))
    means = np.exp(np.mean(logarithms, axis=0))
    return dict(zip(names(config), means.T, strict=True))


def names(config: LlamaConfig) -> list[str]:
    """Of what is measured, in its order."""
    layers = range(config.num_hidden_layers)
    return [
        "embedding",
        *(f"residual stream after layer {layer}" for layer in layers),
        *(f"attention logits of layer {layer}" for layer in layers),
        "logits",
        "change of the logits",
    ]


def _measure(
    program: Program, observe: Callable[..., Any], options: RunOptions, sources: Sequence[Source]
) -> Float[np.ndarray, "steps_and_1 names"]:
    """What `measure` returns, of one seed."""
    dataset = training_windows(options, program.config, sources)
    with closing(placed_batches(program.batch, dataset)) as batches:
        params = initial_params(program, options.seed)
        opt_state = initial_opt_state(program, params)
        batch = next(batches)
        rows = max(1, _TOKENS // options.sequence_length)
        fields = ("input_ids", "position_ids", "segment_ids", "labels")
        seen = batch._replace(**{name: getattr(batch, name)[:1, :rows] for name in fields})
        logits, values = observe(params, seen, None)
        measured = [values]
        for _ in range(options.steps):
            params, opt_state, _ = program.step(params, opt_state, batch, None)
            measured.append(observe(params, seen, logits)[1])
    return np.asarray(jax.device_get(measured))


def _make_observe(program: Program, compute_dtype: Any) -> Callable[..., Any]:
    """`observe(params, batch, initial logits) -> (logits, values in the order of names)`."""

    def observe(
        params: Any, batch: Batch, initial: Float[Array, "rows seq vocab"] | None
    ) -> tuple[Array, Float[Array, " names"]]:
        model = model_of(program, jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params))
        ids, positions, segments = batch.input_ids[0], batch.position_ids[0], batch.segment_ids[0]
        decoded = model.model(ids, position_ids=positions, segment_ids=segments)
        working = working_dtype(compute_dtype)
        logits = einsum(
            "bsh,vh->bsv", decoded.last_hidden_state, model.head_weight, out_dtype=working
        )
        layers = activation_statistics(
            program.graphdef,
            params,
            batch,
            compute_dtype=compute_dtype,
            attention_implementation=None,
        )
        embedded = model.model.embed_tokens(ids).astype(working)
        change = logits - (logits if initial is None else initial)
        ends = [_rms(logits)[None], _rms(change)[None]]
        return logits, jnp.concatenate(
            [_rms(embedded)[None], layers.residual_rms, layers.logit_rms, *ends]
        )

    return observe


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))
