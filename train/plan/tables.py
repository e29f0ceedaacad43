"""Plans as tables for a terminal, and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.hardware.links import Traffic
from train.plan.compiled import Alternative, Plan, remat_in_words
from train.program.mesh import in_words


def show_plan(console: Console, plan: Plan, advice: Sequence[str]) -> None:
    """One plan in full."""
    table = _table("one device", "memory", "bytes")
    memory = plan.memory
    if memory is not None:
        table.add_row("parameters", gib(memory.parameters))
        table.add_row("optimizer state", gib(memory.optimizer_state))
        table.add_row("arguments (both, with padding, and the batch)", gib(memory.arguments))
        table.add_row("outputs", gib(memory.outputs))
        table.add_row("of which overwrite arguments", gib(memory.aliased))
        table.add_row("temporaries (activations, gradients, ...)", gib(memory.temporaries))
        if memory.host:
            table.add_row("offloaded, in the host's memory", gib(memory.host))
    table.add_row("peak", "unknown" if math.isnan(plan.peak) else gib(plan.peak))
    if plan.chip is not None:
        table.add_row(f"memory of a {plan.device_kind}", gib(plan.chip.memory))
        if plan.chip.memory_fraction < 1:
            share = f"of which XLA may use {plan.chip.memory_fraction:.0%}"
            table.add_row(share, gib(plan.chip.usable_memory))
    console.print(table)

    if plan.collectives:
        columns = ["kind", "count", "async", "arrays", "sent", "exposed"]
        network = any(collective.between_hosts for collective in plan.collectives)
        if network:
            columns.append("network")
        sends = _table("collectives of a step, one device", *columns)
        for collective in plan.collectives:
            row = [
                collective.kind,
                f"{collective.count:,}",
                f"{collective.asynchronous:,}",
                gib(collective.bytes),
                gib(collective.sent),
                gib(collective.exposed),
            ]
            sends.add_row(*row, *([gib(collective.between_hosts)] if network else []))
        console.print(sends)
    if plan.chip is not None and plan.traffic:
        console.print(_links(plan.traffic))

    if plan.alternative is not None:
        console.print(_ways_to_gather(plan, plan.alternative))

    costs = _table("time", "quantity", "value")
    costs.add_row("model FLOPs per token, 3 x forward", f"{plan.flops_per_token:.4g}")
    costs.add_row(
        "matmul FLOPs per token, counted in the step", f"{plan.counted_flops_per_token:.4g}"
    )
    if plan.mesh["sequence"] > 1:
        costs.add_row(
            f"attention of the slowest sequence shard ({plan.sequence_order})",
            f"{plan.slowest_attention:.2f} x the mean",
        )
    if plan.pipeline is not None:
        micro_batches, repeats = plan.pipeline
        again = f" x {repeats} repeats" if repeats > 1 else ""
        costs.add_row(
            f"idle share of the stages, {micro_batches} micro-batches{again}",
            f"{plan.pipeline.bubble(plan.mesh['stage']):.1%}",
        )
    limits = plan.roofline
    if limits is not None:
        costs.add_row("matmuls, at the chip's bfloat16 peak", f"{limits.compute:.3f} s")
        costs.add_row("memory, reading and writing the peak once", f"{limits.memory:.3f} s")
        costs.add_row("links, all of the chip's in parallel", f"{limits.links:.3f} s")
        costs.add_row("MFU bound, the longest hiding the others", f"{limits.mfu:.1%}")
        costs.add_row("MFU bound, nothing hidden", f"{limits.mfu_in_turn:.1%}")
    costs.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    console.print(costs)

    if plan.refused is not None:
        console.print(Text.assemble(("does not fit:", "bold red"), f" {plan.refused}"))
    elif plan.fits is None:
        console.print(f"no data sheet for {plan.device_kind}, so whether this fits is unknown")
    else:
        color = "green" if plan.fits else "red"
        console.print("fits" if plan.fits else "does not fit", style=f"bold {color}")
    for sentence in advice:
        console.print(f"advice: {sentence}")


def _links(traffic: Sequence[Traffic]) -> Table:
    """What is sent over which links, and for how long if each collective has its own links to itself."""
    columns = "axes", "links", "sent", "exposed", "time", "exposed time"
    table = _table("links of a step, one device", *columns)
    for row in traffic:
        amounts = gib(row.sent), gib(row.exposed)
        times = f"{row.seconds:.3f} s", f"{row.exposed_seconds:.3f} s"
        table.add_row(" x ".join(row.axes), row.links, *amounts, *times)
    total = sum(row.seconds for row in traffic), sum(row.exposed_seconds for row in traffic)
    table.add_row("all, one after another", "", "", "", *(f"{seconds:.3f} s" for seconds in total))
    return table


def _ways_to_gather(plan: Plan, alternative: Alternative) -> Table:
    """What a device holds and sends by how often weights are gathered and gradients reduced."""
    title = f"weights and gradients of {plan.micro_batches} micro-batches, one device"
    table = _table(title, "--mesh.fsdp-gather", "peak", "sent")
    sent = sum(collective.sent for collective in plan.collectives)
    table.add_row(plan.fsdp_gather, gib(plan.peak), gib(sent))
    other = f"{alternative.fsdp_gather} (estimated)"
    table.add_row(other, f"about {gib(alternative.peak)}", f"about {gib(alternative.sent)}")
    return table


def show_ranking(console: Console, plans: Sequence[Plan]) -> None:
    """The plans of a search, in their order."""
    table = _table(
        "search", "mesh", "remat", "peak", "fits", "MFU bound", "nothing hidden", "compiled in"
    )
    for plan in plans:
        limits = plan.roofline
        table.add_row(
            in_words(plan.mesh),
            remat_in_words(plan),
            "unknown" if math.isnan(plan.peak) else gib(plan.peak),
            {True: "yes", False: "no", None: ""}[plan.fits],
            "" if limits is None else f"{limits.mfu:.1%}",
            "" if limits is None else f"{limits.mfu_in_turn:.1%}",
            f"{plan.compile_seconds:.0f} s",
        )
    console.print(table)


def as_json(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan by name; None where unknown."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = (item.name for item in dataclasses.fields(value))
            return {name: plain(getattr(value, name)) for name in fields}
        if hasattr(value, "_asdict"):
            return {name: plain(inner) for name, inner in value._asdict().items()}
        if isinstance(value, tuple):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return plain(plan)


def gib(count: float) -> str:
    """Bytes in binary units, to three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table
