"""Which links a program communicates over: dimensions of a torus, NVLink, the network; by mesh axes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from train.hardware.chips import CHIPS, Chip
from train.hardware.collectives import network_share
from train.hardware.tpu_topology import Torus, torus_of
from train.hardware.transfers import Transfer


@dataclass(frozen=True)
class Traffic:
    """What a device sends in a step along some axes of the mesh, over one kind of link.

    axes: of the mesh, along which the devices differ that take part.
    links: "ICI x", "ICI x y z" and the like, by the dimensions of the torus that these devices span; "DCN"
        between slices; "NVLink", and "network" between hosts; "" where there is no data sheet.
    sent, exposed: bytes, as of a `Collective`.
    seconds, exposed_seconds: at the bandwidth of these links; nan without a data sheet. A chip has two
        links along a dimension of a torus, of which one is idle if the devices are not a whole ring.
    """

    axes: tuple[str, ...]
    links: str
    sent: float
    exposed: float
    seconds: float
    exposed_seconds: float


def traffic(found: Iterable[Transfer], mesh: Mesh) -> tuple[Traffic, ...]:
    """The transfers of a program that was compiled for `mesh`, by axes and links; what sends most first."""
    layout = _layout(mesh)
    totals: dict[tuple[tuple[str, ...], str], list[Traffic]] = {}
    for transfer in found:
        for axes, links, sent, bandwidth in _parts(transfer, layout):
            exposed = 0.0 if transfer.hidden else sent
            part = Traffic(axes, links, sent, exposed, sent / bandwidth, exposed / bandwidth)
            totals.setdefault((axes, links), []).append(part)
    rows = [
        Traffic(
            *key,
            sent=sum(part.sent for part in parts),
            exposed=sum(part.exposed for part in parts),
            seconds=sum(part.seconds for part in parts),
            exposed_seconds=sum(part.exposed_seconds for part in parts),
        )
        for key, parts in totals.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.sent))


def hosts_of(devices: Sequence[Any]) -> list[int] | None:
    """The host of each GPU, as only those of one host are linked; None for other devices."""
    if devices[0].device_kind not in CHIPS or torus_of(devices) is not None:
        return None
    return [device.process_index for device in devices]


class _Layout(NamedTuple):
    """A mesh, and of each device of a compiled program its place in the mesh, its host and its coordinates.

    A program for several slices is that of each of them: its devices are those of the first.
    """

    axes: tuple[str, ...]
    slice_axes: tuple[str, ...]
    places: Int[np.ndarray, "devices axes"]
    hosts: list[int] | None
    chip: Chip | None
    torus: Torus | None
    coordinates: Int[np.ndarray, "devices dimensions"]


def _layout(mesh: Mesh) -> _Layout:
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    devices: list[Any] = mesh.devices[slices == slices.flat[0]].tolist()
    torus = torus_of(devices)
    spans = [np.ptp(slices, axis=axis).any() for axis in range(slices.ndim)]
    return _Layout(
        axes=mesh.axis_names,
        slice_axes=tuple(name for name, several in zip(mesh.axis_names, spans, strict=True) if several),
        places=np.argwhere(slices == slices.flat[0]),
        hosts=hosts_of(devices),
        chip=CHIPS.get(devices[0].device_kind),
        torus=torus,
        coordinates=np.array([() if torus is None else tuple(device.coords) for device in devices]),
    )  # fmt: skip


def _parts(
    transfer: Transfer, layout: _Layout
) -> Iterator[tuple[tuple[str, ...], str, float, float]]:
    """Axes, links, bytes sent and bytes/s, of each kind of link that a transfer uses."""
    chip, sent = layout.chip, transfer.sent
    network = math.nan if chip is None else chip.network_bandwidth or math.nan
    if transfer.between_slices:
        yield layout.slice_axes, "DCN", sent, network
        return
    if sent == 0:
        return
    group = _connected(transfer)
    differ = np.ptp(layout.places[group], axis=0) > 0
    axes = tuple(name for name, differs in zip(layout.axes, differ, strict=True) if differs)
    if chip is None:
        yield axes, "", sent, math.nan
    elif layout.torus is not None:
        spans = [len(set(along)) for along in layout.coordinates[group].T.tolist()]
        names, links = layout.torus.links(spans)
        per_link = chip.link_bandwidth / (2 * len(layout.torus.lengths))
        yield axes, f"ICI {' '.join(names)}", sent, links * per_link
    else:
        share = network_share(transfer, layout.hosts)
        if share > 0:
            yield axes, "network", sent * share, network
        if share < 1:
            yield axes, "NVLink", sent * (1 - share), chip.link_bandwidth


def _connected(transfer: Transfer) -> Sequence[int]:
    """The devices of one group; of a permute, those that its pairs link to the first source."""
    if transfer.kind != "collective-permute":
        return max(transfer.groups, key=len)
    target = {pair[0]: pair[-1] for pair in transfer.groups}
    first = next(source for source, end in target.items() if source != end or len(target) == 1)
    ring = [first]
    while (following := target.get(ring[-1])) is not None and following not in ring:
        ring.append(following)
    return ring
