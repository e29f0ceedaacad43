"""`python -m train coordinates`."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from llama_jax.files.paths import local_path
from llama_jax.files.remote import remote_path
from llama_jax.formatting import console, printable
from train.coordinates.measure import measure
from train.coordinates.outcome import (
    JSON,
    PICTURE,
    Check,
    slope_table,
    verdict,
    write_outcome,
)
from train.data.sources import common_vocabulary, find_sources
from train.model.config import model_config, with_width
from train.option_checks import validate
from train.options import MeshOptions, RunOptions, with_absolute_paths, with_defaults


def run_coordinates(
    options: RunOptions,
    widths: Sequence[int],
    *,
    wider_heads: bool,
    compare: bool,
    seeds: int,
) -> None:
    """Train the model in every width, measure its activations, and show how they depend on the width.

    Args:
        wider_heads: see `with_width`.
        compare: also with the standard parametrization.
        seeds: see `measure`.

    Raises:
        ValueError: options or widths that are wrong.
    """
    widths = sorted(widths)
    if len({*widths}) < max(2, len(widths)):
        raise ValueError(
            f"widths: found {' '.join(map(str, widths))}, expected two or more that differ"
        )
    _require_usable(options)
    model = options.model
    if model.parametrization == "mup" and model.mup_base_hidden_size is None:
        model = replace(model, mup_base_hidden_size=widths[0])
    options = replace(options, model=model, mesh=MeshOptions(data=1))
    validate(options)
    options = with_defaults(with_absolute_paths(options), jax.default_backend())
    sources = find_sources(options.data, options.tokens, options.tokens.tokenizer)
    config = model_config(options.model, common_vocabulary(sources), options.sequence_length)
    configs = [with_width(config, width, "the model", wider_heads=wider_heads) for width in widths]
    parametrizations = {"mup": options}
    if model.parametrization == "standard":
        parametrizations = {"standard": options}
    elif compare:
        parametrizations["standard"] = _standard(options)
    say = console(stderr=True, soft_wrap=True)
    checks = []
    for name, chosen in parametrizations.items():
        rms = []
        for scaled in configs:
            say.print(f"{name}, width {scaled.hidden_size}: {options.steps} steps")
            rms.append(measure(chosen, scaled, sources, seeds))
        by_name = {name: np.stack([values[name] for values in rms]) for name in rms[0]}
        checks.append(Check(name, widths, by_name))
    folder = local_path(options.out)
    write_outcome(folder, checks)
    for check in checks:
        console().print(slope_table(check))
        print(verdict(check))
    say.print(f"written: {printable(str(folder))} ({JSON}, {PICTURE})")


def _require_usable(options: RunOptions) -> None:
    """Raise ValueError for options that a coordinate check has no use for."""
    if (remote := remote_path(options.out)) is not None:
        raise ValueError(f"out: {remote} is remote; choose a folder on this machine")
    if options.model.width is not None:
        raise ValueError(f"model.width: found {options.model.width}: name it in --widths")
    for name, path in (
        ("init-from", options.init_from),
        ("model.init-from", options.model.init_from),
    ):
        if path is not None:
            raise ValueError(
                f"{name}: found {path}: models begin with random weights; leave it out"
            )


def _standard(options: RunOptions) -> RunOptions:
    model = replace(
        options.model,
        parametrization="standard",
        mup_base_hidden_size=None,
        mup_base_intermediate_size=None,
        mup_base_heads=None,
        mup_base_kv_heads=None,
        mup_base_head_dim=None,
        mup_zero_head=False,
    )
    return replace(options, model=model)
