"""`generation_config.json`: what ends a generation, and how its tokens are chosen unless told otherwise.

The files are other people's, so they are read as transformers reads them: null is absent, `do_sample` is
whatever counts as true in Python, and what only drawing uses is not looked at where nothing is drawn.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, require_tokens
from llama_jax.files.json_object import read_json_object

# fields that only drawing uses, and the values under which they do nothing
_OF_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (50, 0),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
}
# fields that steer which tokens are chosen and are not implemented, and the values that leave it alone
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "sequence_bias": ([], {}),
    "stop_strings": ([], ""),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class GenerationConfig:
    """A `generation_config.json`: what ends and pads a generation, and fields kept to be written back.

    outside: end tokens of the files that the vocabulary has not, such as -1; none can end a text.
    """

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    outside: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], config: LlamaConfig) -> "GenerationConfig":
        """Read the ids from `fields`, or from the model's config where the file leaves them out.

        Raises:
            ValueError: an id that is none.
        """
        eos = token_ids(fields.get("eos_token_id"))
        eos = config.eos_token_ids if eos is None else eos
        pad = token_ids(fields.get("pad_token_id"))
        pad = config.pad_token_id if pad is None else pad
        require_tokens("generation_config.json: eos_token_id", eos, several=True)
        require_tokens("generation_config.json: pad_token_id", pad, several=False)
        ends = (eos,) if isinstance(eos, int) else tuple(eos)
        inside = tuple(end for end in ends if 0 <= end < config.vocab_size)
        outside = tuple(end for end in ends if end not in inside)
        if pad is not None and not 0 <= pad < config.vocab_size:
            pad = None  # Llama 1's files have -1 where there is none
        return cls(inside, pad, dict(fields), outside)

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn unless a call says otherwise."""
        return bool(self.fields.get("do_sample"))

    def default(self, name: str, otherwise: Any) -> Any:
        """The field, or `otherwise` where the file leaves it out."""
        found: Any = self.fields.get(name)
        if name == "top_k" and type(found) in (bool, float) and found == 0:
            found = 0
        if name == "top_p" and isinstance(found, int | float) and not isinstance(found, bool):
            # above 1 keeps everything, and 0 the likeliest token alone, as any number close to it
            found = 1.0 if found > 1 else 1e-30 if found == 0 else found
        return otherwise if found is None else found

    @property
    def idle(self) -> dict[str, Any]:
        """What the file says of drawing although it does not draw."""
        return {} if self.do_sample else self._beyond(_OF_SAMPLING)

    @property
    def unheeded(self) -> dict[str, Any]:
        """Fields that change the tokens in transformers and are not implemented here."""
        found = self._beyond(_NEUTRAL)
        if not self.do_sample:
            found = {name: value for name, value in found.items() if name not in _OF_SAMPLING}
        return found

    def _beyond(self, neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """The fields with another value than null and the neutral ones."""
        return {
            name: self.fields[name]
            for name, values in neutral.items()
            if self.fields.get(name) not in (None, *values)
        }


def token_ids(value: Any) -> Any:
    """A token id, or several, as integers: transformers takes 2.0 and true for 2 and 1 here."""
    if isinstance(value, list):
        return [token_ids(each) for each in value]
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value


GENERATION_FILE = "generation_config.json"


def read_generation_config(directory: Path, config: LlamaConfig) -> GenerationConfig:
    """What the directory's generation_config.json says, or the model's config where there is none."""
    path = directory / GENERATION_FILE
    found = GenerationConfig.from_dict(read_json_object(path) if path.exists() else {}, config)
    if found.outside:
        warnings.warn(
            f"{directory}: eos_token_id: found {list(found.outside)} outside the vocabulary of "
            f"{config.vocab_size}; no text ends there",
            stacklevel=2,
        )
    if found.idle:
        idle = ", ".join(found.idle)
        warnings.warn(
            f"{path}: {idle} without do_sample: tokens are chosen greedily, as in transformers",
            stacklevel=2,
        )
    return found
