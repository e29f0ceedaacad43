"""`python -m train plan`: devices found, the step compiled for them, the figures shown."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llama_jax import formatting
from llama_jax.files.staging import replacing, write_text
from llama_jax.inspection.architecture import parameter_count
from train.hardware.topology import host_devices as devices_of_host
from train.hardware.topology import topology_devices
from train.model.config import model_config
from train.option_checks import validate
from train.options import RunOptions, with_defaults
from train.plan.advice import advice
from train.plan.compiled import Plan, make_plan
from train.plan.search import search
from train.plan.tables import as_json, gib, show_plan, show_ranking
from train.program.mesh import in_words


def run_plan(
    options: RunOptions,
    *,
    topology: str | None,
    host_devices: int | None,
    limit: int | None,
    json_file: Path | None,
) -> None:
    """Print a plan or, with a `limit`, the ranking of a search and its best plan.

    Raises:
        ValueError: options that are wrong in themselves or do not fit the model or the devices; neither
            or both of `topology` and `host_devices`; what `topology_devices` and `search` refuse.
    """
    validate(options)
    config = model_config(options.model, None, options.sequence_length)
    devices = _devices(topology, host_devices)
    options = with_defaults(options, devices[0].platform)
    console = formatting.console(soft_wrap=True)
    model, parts = options.model, options.micro_batches
    console.print(
        f"{parameter_count(config):,} parameters, {model.compute_dtype} over {model.parameter_dtype}; "
        f"{options.batch_size} x {options.sequence_length} tokens a step"
        f"{f' in {parts} parts' if parts > 1 else ''}; {len(devices)} x {devices[0].device_kind}"
    )
    if limit is None:
        plans = [make_plan(options, config, devices)]
    else:
        plans = search(options, config, devices, limit=limit, report=lambda p: _say(console, p))
        show_ranking(console, plans)
    best = plans[0]
    console.print(f"mesh {in_words(best.mesh)}; remat {best.remat}; attention {best.attention}")
    tried = replace(options, model=replace(options.model, remat=best.remat))
    show_plan(console, best, advice(best, tried, config))
    if json_file is not None:
        figures: Any = [as_json(plan) for plan in plans] if limit else as_json(best)
        with replacing(json_file) as staged:
            write_text(staged, json.dumps(figures, indent=2) + "\n")


def _devices(topology: str | None, host_devices: int | None) -> Sequence[Any]:
    if topology is not None and host_devices is None:
        return topology_devices(topology)
    if host_devices is not None and topology is None:
        return devices_of_host(host_devices)
    found = "neither" if topology is None else "both"
    raise ValueError(f"topology, host-devices: found {found}, expected one of them")


def _say(console: Console, plan: Plan) -> None:
    fits = "does not fit" if plan.fits is False else f"peak {gib(plan.peak)}"
    console.print(f"{in_words(plan.mesh)}; {plan.remat}: {fits}")
