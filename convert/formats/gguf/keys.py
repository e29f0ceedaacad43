"""GGUF metadata by type, with every problem collected instead of raised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Keys:
    """The metadata below a prefix such as `llama.`; what is wrong with a value goes to `problems`.

    A reader asks for everything first and raises once, with all of `problems`. Where a value is wrong, a
    harmless one is returned, so that reading can go on.
    """

    metadata: Mapping[str, Any]
    prefix: str
    problems: list[str] = field(default_factory=list)

    def integer(self, key: str, default: int | None = None, *, below: int = 2**31) -> int:
        """A positive integer below `below`. An array, one entry for each layer, must repeat one value."""
        value = self.metadata.get(self.prefix + key)
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                self.problems.append(
                    f"{self.prefix}{key} differs between layers ({sorted(set(value))}), "
                    "expected one value: Hugging Face's Llama has the same shape in every layer"
                )
            value = value[0]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < below:
            self.problems.append(f"{self.prefix}{key} is {value!r}, expected a positive integer")
            return 1
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. A float32 stands for the shortest decimal that rounds to it."""
        value = self.metadata.get(self.prefix + key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float | np.float32) or not math.isfinite(value):
            self.problems.append(f"{self.prefix}{key} is {value!r}, expected a finite number")
            return 1.0
        return float(str(value)) if isinstance(value, np.float32) else float(value)

    def string(self, key: str, default: str) -> str:
        """A string."""
        value = self.metadata.get(self.prefix + key, default)
        if not isinstance(value, str):
            self.problems.append(f"{self.prefix}{key} is {value!r}, expected a string")
            return default
        return value
