"""Pictures of a run's statistics: heat maps by layer over steps."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "statistics"
_LAYERS = {
    "residual_rms": "residual stream, rms",
    "residual_max": "residual stream, largest magnitude",
    "logit_rms": "attention logits, rms",
    "logit_max": "attention logits, largest magnitude",
    "attention_entropy": "attention entropy (nats), mean of heads",
    "dead_units": "dead MLP units (share)",
    "saturated_units": "saturated MLP units (share)",
}
_PARAMETERS = {
    "gradient_norm": "Norms of gradients, before clipping.",
    "update_ratio": "Norms of updates as a fraction of the parameters' norms.",
    "parameter_norm": "Norms of parameters.",
}


class Picture(NamedTuple):
    """name: of its file, without suffix. caption: what it shows."""

    name: str
    caption: str
    figure: "Figure"


def statistics_pictures(lines: list[dict[str, Any]]) -> Iterator[Picture]:
    """Heat maps of the statistics in lines of metrics.jsonl; none if there are none."""
    records = [(line["step"], line["statistics"]) for line in lines if "statistics" in line]
    if not records:
        return
    steps = [step for step, _ in records]

    def matrix(*names: str) -> np.ndarray:
        """[rows, steps], of what is named in each record."""
        columns = []
        for _, record in records:
            value: Any = record
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            columns.append(value)
        known = next((value for value in columns if value is not None), [np.nan])
        blank = np.full_like(np.asarray(known, float), np.nan)
        stacked = np.stack(
            [blank if value is None else np.array(value, float) for value in columns]
        )
        stacked = stacked.reshape(len(steps), blank.shape[0] if blank.ndim else 1, -1)
        return stacked.mean(axis=2).T

    maps = {title: matrix(name) for name, title in _LAYERS.items()}
    yield Picture("activations", "Residual stream, attention and MLP units.", _figure(steps, maps))
    for name, caption in _PARAMETERS.items():
        parameters = records[-1][1].get(name, {})
        maps = {parameter: matrix(name, parameter) for parameter in parameters}
        yield Picture(name, caption, _figure(steps, maps))


def _figure(steps: list[int], maps: dict[str, np.ndarray]) -> "Figure":
    from matplotlib.figure import Figure

    rows = max(1, -(-len(maps) // 3))
    height = 2.6 * rows
    figure = Figure(figsize=(12, height))
    # a layout engine would take seconds
    figure.subplots_adjust(
        left=0.05, right=0.98, top=1 - 0.35 / height, bottom=0.35 / height, hspace=0.35, wspace=0.15
    )
    for index, (title, values) in enumerate(maps.items()):
        _draw(figure.add_subplot(rows, 3, index + 1), steps, title, values)
    return figure


def _draw(axes: "Axes", steps: list[int], title: str, values: np.ndarray) -> None:
    """One heat map; on a logarithmic scale where the values span more than a factor of 30."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    finite = values[np.isfinite(values)]
    wide = finite.size and finite.min() > 0 and finite.max() > 30 * finite.min()
    axes.set_title(title.removeprefix("model.").removesuffix(".weight"), fontsize=9)
    # between two records, the border is halfway
    middles = [(one + other) / 2 for one, other in itertools.pairwise(steps)]
    width = steps[1] - steps[0] if len(steps) > 1 else 1
    edges = [steps[0] - width / 2, *middles, steps[-1] + width / 2]
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(values) + 1) - 0.5,
        np.ma.masked_invalid(values),
        norm=Normalize(0, 1) if title.endswith("(share)") else LogNorm() if wide else None,
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if len(values) > 1:
        axes.set_ylabel("layer", fontsize=8)
    else:
        axes.set_yticks([])
    axes.tick_params(labelsize=8)
    assert axes.figure is not None
    axes.figure.colorbar(mesh, ax=axes).ax.tick_params(labelsize=8)
