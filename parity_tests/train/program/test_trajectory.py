"""A hundred training steps here and in a plain torch loop, from the same weights on the same data.

In float64 torch trains the oracle, because transformers computes parts of its model in float32. In float32
it trains transformers' model, and both are compared with the float64 trajectory.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn.functional import cross_entropy

from llama_jax.checkpoints import huggingface
from parity_tests.harness.cases import BASE, hf_inputs, hf_model, weights_of
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.harness.programs import our_model
from parity_tests.reference.errors import rms_error, worst
from parity_tests.reference.oracle import oracle
from parity_tests.reference.tolerances import ROUNDING_RATIO
from train.data.batch import Batch
from train.program.optimizer import make_optimizer
from train.program.schedules import learning_rate_schedule
from train.program.step import make_step

TRAJECTORY_BAR = 1e-9  # relative, after 100 steps in float64
STEPS, WARMUP, PEAK, FINAL = 100, 10, 3e-3, 0.1
BETAS, EPS, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
MICRO, ROWS, LENGTH = 2, 2, 12
CONFIG = BASE | {"attention_bias": True}  # so that there are biases, which do not decay

Windows = dict[str, np.ndarray]
Numbers = dict[str, np.ndarray]


class Trajectory(NamedTuple):
    """losses: of every step. state: parameters and both moments at the end, by Hugging Face's names."""

    losses: list[float]
    state: Numbers


def windows(seed: int, packed: bool) -> Iterator[Windows]:
    """Every step's batch, int32 [micro, rows, seq]; a fifth of the labels ignored, differently in each."""
    rng = np.random.default_rng([seed, 2])
    shape = MICRO, ROWS, LENGTH
    positions = np.arange(LENGTH)
    for _ in range(STEPS):
        ids = rng.integers(0, CONFIG["vocab_size"], (*shape[:2], LENGTH + 1))
        # the next token follows from this one most of the time, so that there is something to learn
        successor = (7 * ids[..., :-1] + 3) % CONFIG["vocab_size"]
        labels = np.where(rng.random(shape) < 0.7, successor, ids[..., 1:])
        labels[rng.random(shape) < 0.2 + 0.3 * rng.random()] = -100
        begins = (rng.random(shape) < 0.25) & packed | (positions == 0)
        starts = np.maximum.accumulate(np.where(begins, positions, 0), axis=-1)
        batch = {
            "input_ids": ids[..., :-1],
            "labels": labels,
            "segment_ids": begins.cumsum(-1),
            "position_ids": positions - starts,
        }
        yield {name: value.astype(np.int32) for name, value in batch.items()}


# torch ----------------------------------------------------------------------------------------------


def torch_trajectory(
    weights: dict[str, torch.Tensor], data: Iterator[Windows], dtype: torch.dtype
) -> Trajectory:
    logits, parameters = (oracle_logits if dtype == torch.float64 else hf_logits)(weights)
    decays = {name: not name.endswith(".bias") and "norm" not in name for name in parameters}
    groups = [
        {
            "params": [p for name, p in parameters.items() if decays[name] == decay],
            "weight_decay": DECAY * decay,
        }
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for batch in data:
        count = int((batch["labels"] != -100).sum())
        total = 0.0
        optimizer.zero_grad()
        for micro in range(MICRO):
            part = {name: torch.from_numpy(array[micro]).long() for name, array in batch.items()}
            labels = part.pop("labels").flatten()
            loss = cross_entropy(logits(part).flatten(0, 1), labels, reduction="sum") / count
            loss.backward()
            total += loss.item()
        # torch divides by norm + 1e-6, optax by the norm: this limit cancels the difference
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values()])
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP * (1 + 1e-6 / norm.item()))
        optimizer.step()
        schedule.step()
        losses.append(total)
    state = {}
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        state |= {
            name: parameter,
            f"m {name}": moments["exp_avg"],
            f"v {name}": moments["exp_avg_sq"],
        }
    return Trajectory(losses, {name: value.detach().numpy() for name, value in state.items()})


def factor(step: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2


def oracle_logits(weights: dict[str, torch.Tensor]) -> tuple[Callable[..., Any], dict[str, Any]]:
    parameters = {name: w.double().requires_grad_() for name, w in weights.items()}
    return lambda part: oracle(CONFIG, parameters, **part).logits, parameters


def hf_logits(weights: dict[str, torch.Tensor]) -> tuple[Callable[..., Any], dict[str, Any]]:
    model = hf_model(CONFIG, weights)

    def logits(part: dict[str, torch.Tensor]) -> torch.Tensor:
        arrays = {name: tensor.numpy() for name, tensor in part.items()}
        return model(**hf_inputs(arrays)).logits

    return logits, dict(model.named_parameters())


# JAX ------------------------------------------------------------------------------------------------


def our_program(
    dtype: Any, compute_dtype: Any, options: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """The optimizer and the jitted step; one compilation serves every seed."""
    schedule = learning_rate_schedule(
        "cosine",
        peak=PEAK,
        steps=STEPS,
        warmup_steps=WARMUP,
        final_fraction=FINAL,
        decay_fraction=0.0,
    )
    rule = make_optimizer(
        "adamw",
        schedule,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=DECAY,
        clip_norm=CLIP,
    )
    graphdef, _ = nnx.split(our_model(CONFIG, weights_of(CONFIG), dtype))
    step = make_step(graphdef, rule, compute_dtype=compute_dtype, z_loss=0.0)
    return rule, jax.jit(step, compiler_options=options)


def our_trajectory(
    program: tuple[Any, Any], weights: dict[str, torch.Tensor], data: Iterator[Windows], dtype: Any
) -> Trajectory:
    rule, step = program
    graphdef, state = nnx.split(our_model(CONFIG, weights, dtype))
    params = nnx.to_pure_dict(state)
    opt_state = rule.init(params)
    losses = []
    for batch in data:
        params, opt_state, metrics = step(params, opt_state, Batch(**batch), None)
        losses.append(metrics.loss)
    (adam,) = (
        state
        for state in jax.tree.leaves(opt_state, is_leaf=lambda node: hasattr(node, "mu"))
        if hasattr(state, "mu")
    )
    named = {
        prefix + name: value
        for prefix, tree in (("", params), ("m ", adam.mu), ("v ", adam.nu))
        for name, value in huggingface.to_hf_tensors(nnx.merge(graphdef, tree))
    }
    return Trajectory([float(loss) for loss in losses], named)


def test_float64_trajectory_is_that_of_torch() -> None:
    weights = weights_of(CONFIG)
    with jax.enable_x64(True):
        program = our_program(jnp.float64, jnp.float64, FAST_COMPILE)
    for packed in (False, True):
        expected = torch_trajectory(weights, windows(0, packed), torch.float64)
        with jax.enable_x64(True):
            actual = our_trajectory(program, weights, windows(0, packed), jnp.float64)
        assert expected.losses[-1] < expected.losses[0] - 0.5  # the steps do train
        losses = np.abs(np.subtract(actual.losses, expected.losses)) / expected.losses
        error, name = worst(actual.state, expected.state)
        print(f"float64, {packed=}: losses {losses.max():.1e}, state {error:.1e} ({name})")
        assert losses.max() <= TRAJECTORY_BAR
        assert error <= TRAJECTORY_BAR, name


def pooled(seeds: int) -> tuple[float, float]:
    """rms error of the losses in float32, ours and transformers', over packed and unpacked windows."""
    program = our_program(jnp.float32, jnp.float32)
    ours, theirs, exact = [], [], []
    for seed, packed in itertools.product(range(seeds), (False, True)):
        weights = weights_of(CONFIG, seed)
        exact.append(torch_trajectory(weights, windows(seed, packed), torch.float64).losses)
        theirs.append(torch_trajectory(weights, windows(seed, packed), torch.float32).losses)
        ours.append(our_trajectory(program, weights, windows(seed, packed), jnp.float32).losses)
    return rms_error(ours, exact), rms_error(theirs, exact)


@pytest.mark.parametrize("seeds", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_float32_error_is_within_the_rounding_ratio_of_torch(seeds: int) -> None:
    ours, theirs = pooled(seeds)
    print(f"float32, {seeds} seeds: losses {ours:.2e}, torch {theirs:.2e}, {ours / theirs:.2f}")
    assert ours <= ROUNDING_RATIO * theirs


def test_bfloat16_losses_are_near_float32() -> None:
    weights = weights_of(CONFIG)
    exact, rounded = (
        our_trajectory(
            our_program(jnp.float32, compute, FAST_COMPILE),
            weights,
            itertools.islice(windows(0, True), 30),
            jnp.float32,
        )
        for compute in (jnp.float32, jnp.bfloat16)
    )
    errors = np.abs(np.subtract(rounded.losses, exact.losses)) / exact.losses
    print(f"bfloat16 computation: losses {errors.max():.1e} from float32's")
    assert 1e-5 < errors.max() < 0.03
