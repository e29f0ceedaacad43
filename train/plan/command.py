"""`python -m train plan`: choose devices, compile the step for them, show what it costs."""

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
from train.plan.compiled import Plan, make_plan, remat_in_words
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
            or both of `topology` and `host_devices`; as `topology_devices`, `host_devices` and `search`.
    """
    validate(options)
    config = model_config(options.model, None, options.sequence_length)
    devices = _devices(topology, host_devices)
    options = with_defaults(options, devices[0].platform)
    console = formatting.console(soft_wrap=True)
    model, micro_batches = options.model, options.micro_batches
    split = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
    console.print(
        f"{parameter_count(config):,} {model.parameter_dtype} parameters, computed in "
        f"{model.compute_dtype}; "
        f"{options.batch_size} x {options.sequence_length} tokens a step{split}; "
        f"{len(devices)} x {devices[0].device_kind}"
    )
    if limit is None:
        plans = [make_plan(options, config, devices)]
    else:
        plans = search(
            options, config, devices, limit=limit, report=lambda plan: _show_progress(console, plan)
        )
        show_ranking(console, plans)
    best = plans[0]
    reason = "" if best.attention_reason is None else f" ({best.attention_reason})"
    console.print(
        f"mesh {in_words(best.mesh)}; remat {remat_in_words(best)}; attention {best.attention}{reason}",
    )
    options = replace(options, model=replace(options.model, remat=best.remat))
    show_plan(console, best, advice(best, options, config))
    if json_file is not None:
        result: Any = [as_json(plan) for plan in plans] if limit else as_json(best)
        with replacing(json_file) as staged:
            write_text(staged, json.dumps(result, indent=2) + "\n")


def _devices(topology: str | None, host_devices: int | None) -> Sequence[Any]:
    if topology is not None and host_devices is None:
        return topology_devices(topology)
    if host_devices is not None and topology is None:
        return devices_of_host(host_devices)
    raise ValueError("give exactly one of --topology and --host-devices")


def _show_progress(console: Console, plan: Plan) -> None:
    fits = "does not fit" if plan.fits is False else f"peak {gib(plan.peak)}"
    console.print(f"{in_words(plan.mesh)}; {remat_in_words(plan)}: {fits}")
