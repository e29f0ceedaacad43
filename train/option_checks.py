"""Checks of a run's options that need neither data nor devices."""

from dataclasses import fields

import jax.numpy as jnp
import numpy as np

from train.options import GuardOptions, ModelOptions, OptimizerOptions, RunOptions, warmup_steps
from train.program.mup import OPTIMIZERS
from train.program.optimizer import DIRECTIONS
from train.program.schedules import USES, require_fit

_BASE = [field.name for field in fields(ModelOptions) if field.name.startswith("mup_base_")]


def validate(options: RunOptions) -> None:
    """Raise ValueError for the first option that is out of range or does not fit the others."""
    for name in ("parameter_dtype", "compute_dtype"):
        if getattr(options.model, name) == "float16":
            raise ValueError(
                f"model.{_flag(name)}: found float16, expected bfloat16, float32 or float64: small "
                "gradients become 0 in float16"
            )
    _require_remat(options.model)
    _require_parametrization(options.model, options.optimizer)
    _require_width(options)
    require_counts(options)
    _require_numbers(options)
    _require_used(options.optimizer)
    _require_guard(options.guard)
    optimizer = options.optimizer
    require_fit(
        optimizer.schedule,
        steps=options.steps,
        warmup_steps=warmup_steps(optimizer, options.steps),
        decay_fraction=optimizer.decay_fraction,
    )


def require_counts(options: RunOptions) -> None:
    """Raise ValueError for the first count that is out of range."""
    distributed = options.distributed
    at_least = {
        "steps": (options.steps, 1),
        "batch-size": (options.batch_size, 1),
        "sequence-length": (options.sequence_length, 1),
        "micro-batches": (options.micro_batches, 1),
        "export-every": (options.export_every, 0),
        "model.scan-unroll": (options.model.scan_unroll, 1),
        "model.width": (options.model.width, 1),
        **{f"model.{_flag(name)}": (getattr(options.model, name), 1) for name in _BASE},
        "optimizer.warmup-steps": (options.optimizer.warmup_steps, 0),
        # the standard deviation of one step is not defined
        "guard.window": (options.guard.window, 2),
        "guard.non-finite": (options.guard.non_finite, 0),
        "distributed.processes": (distributed.processes, 1),
        "mesh.stage-micro-batches": (options.mesh.stage_micro_batches, 1),
        "mesh.stage-repeats": (options.mesh.stage_repeats, 1),
        "distributed.process-id": (distributed.process_id, 0),
        "checkpoint.every": (options.checkpoint.every, 1),
        "checkpoint.keep-last": (options.checkpoint.keep_last, 1),
        "checkpoint.keep-every": (options.checkpoint.keep_every, 1),
        "evaluation.every": (options.evaluation.every, 0),
        "evaluation.batches": (options.evaluation.batches, 0),
        "evaluation.sample-tokens": (options.evaluation.sample_tokens, 0),
        "log.statistics-every": (options.log.statistics_every, 0),
    }
    for name, (value, minimum) in at_least.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name}: found {value}, expected at least {minimum}")
    if options.batch_size % options.micro_batches:
        raise ValueError(
            f"micro-batches: found {options.micro_batches}, expected a divisor of the batch size "
            f"{options.batch_size}"
        )


def _require_remat(model: ModelOptions) -> None:
    """Names of kept values need a policy that does not keep them already."""
    for name, values in (("save", model.remat_save), ("offload", model.remat_offload)):
        if values and model.remat != "full":
            raise ValueError(
                f"model.remat-{name}: found {' '.join(values)} with --model.remat {model.remat}, expected "
                "--model.remat full, which keeps nothing else"
            )
    if both := [name for name in model.remat_offload if name in model.remat_save]:
        raise ValueError(
            f"model.remat-offload: found {both[0]}, which model.remat-save has as well: leave it out of one"
        )


def _require_parametrization(model: ModelOptions, optimizer: OptimizerOptions) -> None:
    """The base's widths belong to mup, and mup to some optimizers. The model is not known yet."""
    if model.parametrization == "standard":
        for name in (*_BASE, "mup_zero_head"):
            if (value := getattr(model, name)) != getattr(ModelOptions, name):
                raise ValueError(
                    f"model.{_flag(name)}: found {value} with --model.parametrization standard, which does "
                    "not use it: leave it out, or choose --model.parametrization mup"
                )
    elif optimizer.name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer.name: found {optimizer.name} with --model.parametrization mup, expected "
            f"{' or '.join(OPTIMIZERS)}"
        )


def _require_width(options: RunOptions) -> None:
    width, weights = options.model.width, options.model.init_from or options.init_from
    if width is not None and weights is not None:
        raise ValueError(
            f"model.width: found {width} with the weights of {weights}, which have a width: leave it out"
        )


def _require_numbers(options: RunOptions) -> None:
    optimizer = options.optimizer
    below_1 = float(np.nextafter(1, 0))
    # a smaller eps or clip is 0 in the parameters' dtype: 0 / 0 without a gradient, or no update
    dtype = jnp.finfo(options.model.parameter_dtype)
    smallest, finite = float(dtype.smallest_normal), float(dtype.max)
    # a beta that rounds to 1 in float32 makes Adam's bias correction, 1 - beta^step, 0
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    beta = 0.0, below_one, "at least 0 and below 1"
    amount = 0.0, finite, "a finite number of at least 0"
    sigma = smallest, finite, "a finite number above 0, or None"
    positive = f"a finite number above 0 (at least {smallest:.2g})"
    # name: its value, minimum, maximum, and the range in words
    numbers: dict[str, tuple[float | None, float, float, str]] = {
        "optimizer.learning-rate": (optimizer.learning_rate, *amount),
        "optimizer.final-fraction": (optimizer.final_fraction, 0, 1, "0 to 1"),
        "optimizer.decay-fraction": (
            optimizer.decay_fraction,
            smallest,
            1,
            "above 0 and at most 1",
        ),
        "optimizer.beta1": (optimizer.beta1, *beta),
        "optimizer.beta2": (optimizer.beta2, *beta),
        "optimizer.eps": (optimizer.eps, smallest, finite, positive),
        "optimizer.weight-decay": (optimizer.weight_decay, *amount),
        "optimizer.clip-norm": (
            optimizer.clip_norm,
            smallest,
            finite,
            f"{positive}, or None for no clipping",
        ),
        "optimizer.z-loss": (optimizer.z_loss, *amount),
        "tokens.validation-fraction": (
            options.tokens.validation_fraction,
            0,
            below_1,
            "at least 0 and below 1",
        ),
        "evaluation.sample-temperature": (options.evaluation.sample_temperature, *amount),
        "guard.loss-sigma": (options.guard.loss_sigma, *sigma),
        "guard.norm-sigma": (options.guard.norm_sigma, *sigma),
        "guard.update-sigma": (options.guard.update_sigma, *sigma),
        "average.decay": (options.average.decay, smallest, below_1, "above 0 and below 1"),
        "log.peak-flops": (options.log.peak_flops, smallest, finite, "a finite number above 0"),
    }
    for name, (value, minimum, maximum, expected) in numbers.items():
        if value is not None and not minimum <= value <= maximum:
            raise ValueError(f"{name}: found {value}, expected {expected}")


def _require_used(optimizer: OptimizerOptions) -> None:
    """An option that the optimizer or the schedule does not use must keep its default."""
    unused = {
        optimizer.name: {"beta1", "beta2", "eps"} - {*DIRECTIONS[optimizer.name].uses},
        optimizer.schedule: {"final_fraction", "decay_fraction"} - {*USES[optimizer.schedule]},
    }
    for user, names in unused.items():
        for name in sorted(names):
            value, default = getattr(optimizer, name), getattr(OptimizerOptions, name)
            if value != default:
                raise ValueError(
                    f"optimizer.{_flag(name)}: found {value}, but {user} does not use it: leave it out, or "
                    f"at {default}"
                )


def _require_guard(guard: GuardOptions) -> None:
    """An option of the guard that its action does not use must keep its default."""
    used = {
        None: {"non_finite"},
        "skip": {"non_finite", "window", "loss_sigma", "norm_sigma", "update_sigma"},
        "clip": {"non_finite", "window", "norm_sigma"},
        "clip-layers": {"non_finite", "window", "norm_sigma"},
    }
    for name, value in vars(guard).items():
        default = getattr(GuardOptions, name)
        if name not in {"action", *used[guard.action]} and value != default:
            with_action = f"--guard.action {guard.action}" if guard.action else "no --guard.action"
            raise ValueError(
                f"guard.{_flag(name)}: found {value} with {with_action}, which does not use it: leave it "
                f"out, or choose --guard.action skip"
            )
    if guard.action and guard.norm_sigma is None:
        others = guard.loss_sigma, guard.update_sigma
        if guard.action != "skip" or others == (None, None):
            raise ValueError(
                f"guard.norm-sigma: found None with --guard.action {guard.action}, which then has nothing "
                "to judge a step by: give a number, or leave out the action"
            )


def _flag(name: str) -> str:
    return name.replace("_", "-")
