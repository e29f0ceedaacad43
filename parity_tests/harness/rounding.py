"""Rounding errors of ours and of Hugging Face's model, pooled over seeds so that luck does not decide."""

from collections import defaultdict

import jax.numpy as jnp
import torch

from parity_tests.harness.cases import Case, hf_model, inputs_of, weights_of
from parity_tests.harness.programs import (
    compiled,
    hf_numbers,
    oracle_numbers,
    our_inputs,
    our_model,
    our_numbers,
)
from parity_tests.reference.errors import rms_error

# The loss is one number a run, and the rms of n independent errors is uncertain by 1/sqrt(2 n): the
# ratio of two programs that are equally good, from 80 runs each, by 0.11.
WEIGHT_SEEDS = 8


def pooled_errors(
    case: Case, input_seeds: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[float, float]]:
    """rms error of ours and of Hugging Face's in `dtype` for each number, pooled over all seeds."""
    ours, theirs, truth = defaultdict(list), defaultdict(list), defaultdict(list)
    jax_dtype = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}[dtype]
    run = compiled(our_inputs(inputs_of(case.inputs, case.config), jax_dtype)[1])
    for seed in range(WEIGHT_SEEDS):
        weights = {
            name: weight.to(dtype).float() for name, weight in weights_of(case.config, seed).items()
        }
        model, hf = our_model(case.config, weights, jax_dtype), hf_model(case.config, weights)
        for parameter in hf.parameters():  # and not the rotary frequencies, which stay float32
            parameter.data = parameter.data.to(dtype)
        for draw in range(seed * input_seeds, (seed + 1) * input_seeds):
            inputs = inputs_of(case.inputs, case.config, draw)
            for pool, numbers in (
                (ours, our_numbers(model, inputs, run)),
                (theirs, hf_numbers(hf, inputs)),
                (truth, oracle_numbers(case.config, weights, inputs)),
            ):
                for name, value in numbers.items():
                    pool[name].append(value)
    return {
        name: (rms_error(ours[name], truth[name]), rms_error(theirs[name], truth[name]))
        for name in truth
    }
