"""Every optimizer's definition in plain numpy, for a single parameter.

Each follows its paper, not a library. A new optimizer needs one here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Options = dict[str, Any]
State = dict[str, np.ndarray]


def adamw(state: State, g: np.ndarray, p: np.ndarray, step: int, o: Options) -> np.ndarray:
    """arXiv:1711.05101, algorithm 2."""
    m = state["m"] = o["beta1"] * state.get("m", 0) + (1 - o["beta1"]) * g
    v = state["v"] = o["beta2"] * state.get("v", 0) + (1 - o["beta2"]) * g * g
    return (m / (1 - o["beta1"] ** step)) / (np.sqrt(v / (1 - o["beta2"] ** step)) + o["eps"])


def lion(state: State, g: np.ndarray, p: np.ndarray, step: int, o: Options) -> np.ndarray:
    """arXiv:2302.06675, program 1."""
    m = state.get("m", 0)
    state["m"] = o["beta2"] * m + (1 - o["beta2"]) * g
    return np.sign(o["beta1"] * m + (1 - o["beta1"]) * g)


def sgd(state: State, g: np.ndarray, p: np.ndarray, step: int, o: Options) -> np.ndarray:
    """With momentum; its decay is that of algorithm 1 of arXiv:1711.05101."""
    state["m"] = o["beta1"] * state.get("m", 0) + g
    return state["m"]


def muon(state: State, g: np.ndarray, p: np.ndarray, step: int, o: Options) -> np.ndarray:
    """Keller Jordan's Muon with the scale of arXiv:2502.16982; AdamW for all but matrices in layers."""
    if not o["layer"] or p.ndim != 2:
        return adamw(state, g, p, step, o)
    m = state["m"] = o["beta1"] * state.get("m", 0) + (1 - o["beta1"]) * g
    nesterov = o["beta1"] * m + (1 - o["beta1"]) * g
    return 0.2 * np.sqrt(max(p.shape)) * newton_schulz(nesterov, o["eps"])


def newton_schulz(matrix: np.ndarray, eps: float) -> np.ndarray:
    """Five steps of the quintic."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.astype(np.float64)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def adafactor(state: State, g: np.ndarray, p: np.ndarray, step: int, o: Options) -> np.ndarray:
    """arXiv:1804.04235, algorithms 4 to 6, factored if both dimensions are at least 128, as in T5."""
    beta2 = 1 - step**-0.8
    square = g * g + 1e-30
    if p.ndim == 2 and min(p.shape) >= 128:
        rows = state["r"] = beta2 * state.get("r", 0) + (1 - beta2) * square.mean(1)
        columns = state["c"] = beta2 * state.get("c", 0) + (1 - beta2) * square.mean(0)
        v = np.outer(rows, columns) / rows.mean()
    else:
        v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * square
    u = g / np.sqrt(v)
    u = u / max(1.0, rms(u))
    return max(1e-3, rms(p)) * u


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


DEFINITIONS: dict[str, Callable[..., np.ndarray]] = {
    "adamw": adamw,
    "muon": muon,
    "lion": lion,
    "adafactor": adafactor,
    "sgd": sgd,
}


def trajectory(
    name: str,
    p: np.ndarray,
    gradients: Sequence[np.ndarray],
    rates: Sequence[float],
    decay: float,
    options: Options,
) -> np.ndarray:
    """The parameter after all steps: p -= rate * (direction + decay * p)."""
    state: State = {}
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        direction = DEFINITIONS[name](state, gradient, p, step, options)
        p = p - rate * (direction + decay * p)
    return p
