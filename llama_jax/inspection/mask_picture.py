"""Pictures of the attention mask that the model uses: which token sees which."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from llama_jax.attention.cache import KVCache
from llama_jax.attention.masks import dense_mask
from llama_jax.files.staging import replacing
from llama_jax.models.decoder import mask_and_cache

if TYPE_CHECKING:
    from rich.text import Text

PADDING = "<pad>"
_SEEN, _UNSEEN, _GAP = "■ ", "· ", "… "
_LABEL, _HEADER = 14, 8  # characters of a token beside its row and above its column
_LABELLED = 64  # tokens up to which a PNG names them


class MaskPicture(NamedTuple):
    """The mask of one row of a batch, queries as lines and keys as columns, and the tokens' texts."""

    title: str
    visible: Bool[np.ndarray, "queries keys"]
    queries: Sequence[str]
    keys: Sequence[str]


def visible_keys(
    is_token: Bool[np.ndarray, "batch seq"],
    segment_ids: Int[np.ndarray, "batch seq"] | None = None,
    *,
    cached: int = 0,
) -> Bool[np.ndarray, "batch queries keys"]:
    """Which of `seq` keys each query sees, from the model's mask (`mask_and_cache`, `dense_mask`).

    Args:
        is_token: False for padding.
        segment_ids: packed documents; None for one per row.
        cached: treat this many tokens as already cached: they are keys, but not queries.

    Raises:
        ValueError: all tokens are cached, or segments of another shape.
    """
    batch, seq = is_token.shape
    if not 0 <= cached < seq:
        raise ValueError(f"cached: found {cached}, expected 0 to {seq - 1} of {seq} tokens")
    if segment_ids is None:
        segment_ids = np.zeros((batch, seq), np.int32)
    if segment_ids.shape != (batch, seq):
        raise ValueError(f"segment_ids: found shape {segment_ids.shape}, expected {(batch, seq)}")
    tokens, segments = jnp.asarray(is_token), jnp.asarray(segment_ids, jnp.int32)
    cache = None
    if cached:
        no_layers = jnp.zeros((0, batch, seq, 0, 0))  # the mask depends on neither keys nor values
        empty = KVCache(
            keys=no_layers,
            values=no_layers,
            is_token=jnp.zeros((batch, seq), bool),
            segments=jnp.zeros((batch, seq), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )
        _, cache = mask_and_cache(batch, cached, tokens[:, :cached], segments[:, :cached], empty)
    queries = seq - cached
    mask, _ = mask_and_cache(batch, queries, tokens[:, cached:], segments[:, cached:], cache)
    return np.asarray(dense_mask(mask, queries, seq))[:, 0]


def mask_pictures(
    texts: Sequence[Sequence[str]],
    *,
    packed: bool = False,
    padding_side: str = "right",
    cached: int = 0,
) -> list[MaskPicture]:
    """Pictures of a batch of tokenized texts: of each row, padded to the longest, or of one packed row.

    Raises:
        ValueError: a text without tokens, or as `visible_keys`.
    """
    if not texts or not all(map(len, texts)):
        raise ValueError("text: no tokens, expected at least one")
    if packed:
        segments = [index for index, text in enumerate(texts) for _ in text]
        rows = [[token for text in texts for token in text]]
        is_token, segment_ids = np.ones((1, len(segments)), bool), np.array([segments], np.int32)
        kind = f"{len(texts)} packed texts"
    else:
        longest = max(map(len, texts))
        padding = [[PADDING] * (longest - len(text)) for text in texts]
        left = padding_side == "left"
        rows = [[*p, *t] if left else [*t, *p] for t, p in zip(texts, padding, strict=True)]
        slots = np.arange(longest)
        lengths = np.array([[len(text)] for text in texts])
        is_token = slots >= longest - lengths if left else slots < lengths
        segment_ids = None
        kind = "causal" if is_token.all() else f"causal, padded on the {padding_side}"
    kind += f", {cached} cached" if cached else ""
    visible = visible_keys(is_token, segment_ids, cached=cached)
    return [
        MaskPicture(f"{kind}, row {number}" if len(rows) > 1 else kind, mask, row[cached:], row)
        for number, (mask, row) in enumerate(zip(visible, rows, strict=True), 1)
    ]


def draw_text(picture: MaskPicture, width: int) -> "Text":
    """The picture in `width` columns of a terminal; if it is wider, the middle is left out."""
    from rich.cells import set_cell_size
    from rich.text import Text

    label = min(max(len(_shown(text)) for text in picture.queries), _LABEL)
    digits = len(str(len(picture.keys)))
    margin = digits + 1 + label + 1
    room = max((width - margin) // 2, 3)
    keys, queries = _window(len(picture.keys), room), _window(len(picture.queries), room)
    drawn = Text(f"{picture.title}\n{_SEEN}the row's token sees the column's\n")

    names = ["" if key is None else _shown(picture.keys[key], _HEADER) for key in keys]
    height = max(map(len, names))
    for line in range(height):
        drawn.append(" " * margin)
        for name in names:
            # aligned at the bottom, above its column
            index = line - (height - len(name))
            drawn.append(set_cell_size(name[index] if index >= 0 else " ", 2))
        drawn.append("\n")
    first = len(picture.keys) - len(picture.queries)
    for query in queries:
        if query is None:
            drawn.append(" " * margin + _GAP * len(keys) + "\n", style="dim")
            continue
        name = set_cell_size(_shown(picture.queries[query], label), label)
        drawn.append(f"{first + query:>{digits}} {name} ")
        for key in keys:
            seen = key is not None and picture.visible[query, key]
            cell = _GAP if key is None else _SEEN if seen else _UNSEEN
            drawn.append(cell, style="bold" if seen else "dim")
        drawn.append("\n")
    if None in keys or None in queries:
        drawn.append(f"{len(picture.queries)} x {len(picture.keys)} tokens, the middle left out\n")
    return drawn


def draw_png(pictures: Sequence[MaskPicture], path: Path) -> None:
    """All pictures, one below the other. Raises ValueError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install 'llama-jax[plot]'") from None
    wide = min(max(4.0, 2 + 0.25 * len(pictures[0].keys)), 20.0)
    share = len(pictures[0].queries) / len(pictures[0].keys)
    high = min(max(2.0, 2 + share * (wide - 2)), 20.0)
    figure = Figure(figsize=(wide, high * len(pictures)), layout="constrained")
    for axes, picture in zip(
        np.ravel(figure.subplots(len(pictures), squeeze=False)), pictures, strict=True
    ):
        axes.imshow(picture.visible, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(picture.title, fontsize=10)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        if len(picture.keys) <= _LABELLED:
            first = len(picture.keys) - len(picture.queries)
            columns = [_shown(text, _LABEL) for text in picture.keys]
            rows = [f"{first + n} {_shown(t, _LABEL)}" for n, t in enumerate(picture.queries)]
            style = {"fontsize": 7, "family": "monospace", "parse_math": False}
            axes.set_xticks(range(len(columns)), columns, rotation=90, **style)
            axes.set_yticks(range(len(rows)), rows, **style)
            axes.set_xticks(np.arange(len(columns)) - 0.5, minor=True)
            axes.set_yticks(np.arange(len(rows)) - 0.5, minor=True)
            axes.grid(which="minor", color="0.8", linewidth=0.5)
            axes.tick_params(which="minor", length=0)
    with replacing(path) as staged, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(staged)


def _shown(text: str, limit: int | None = None) -> str:
    """A token on one line, with visible spaces, cut to `limit` characters."""
    shown = repr(text)[1:-1].replace(" ", "▁") or "''"
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def _window(count: int, room: int) -> list[int | None]:
    """Indices of `count` items that fit in `room`: the first and the last, with None between them."""
    if count <= room:
        return list(range(count))
    head = room // 2
    tail = room - head - 1
    return [*range(head), None, *range(count - tail, count)]
