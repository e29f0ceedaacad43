"""`generation_config.json`: the tokens that end a generation, and the defaults of sampling.

Files are read as transformers reads them: null means absent, `do_sample` is anything that is true in
Python, and options of sampling are ignored without it.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, require_tokens
from llama_jax.files.json_object import read_json_object
from llama_jax.generation.sampling import LogitsProcessor, Sampling
from llama_jax.numerics.scalars import plain_number

DEFAULT_TOP_K = 50  # transformers' own

# fields that only sampling uses, and the values under which they do nothing
_SAMPLING_ONLY: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (50, 0),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
}
# fields that change which tokens are chosen and are not implemented, and the values under which they do not
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
    """A `generation_config.json`: the defaults of `generate`.

    Attributes:
        eos_token_ids: the tokens that end a row.
        pad_token_id: fills rows that have ended.
        fields: all fields of the file; they are written back by `save_pretrained`.
        outside: the file's end tokens that are not in the vocabulary, such as -1; they are ignored.

    Examples:
        >>> from llama_jax import PRESETS, GenerationConfig
        >>> fields = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 7]}
        >>> config = GenerationConfig.from_dict(fields, PRESETS["tiny-4m"])
        >>> config.eos_token_ids, config.sampling().temperature
        ((2, 7), 0.6)
    """

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    outside: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], config: LlamaConfig) -> "GenerationConfig":
        """Read the ids from `fields`, or from the model's `config` where they are absent.

        Raises:
            ValueError: an id that is not an integer.
        """
        eos = token_ids(fields.get("eos_token_id"))
        eos = config.eos_token_ids if eos is None else eos
        pad = token_ids(fields.get("pad_token_id"))
        pad = config.pad_token_id if pad is None else pad
        require_tokens("generation_config.json: eos_token_id", eos, several=True)
        require_tokens("generation_config.json: pad_token_id", pad, several=False)
        ids = (eos,) if isinstance(eos, int) else tuple(eos)
        inside = tuple(token for token in ids if 0 <= token < config.vocab_size)
        outside = tuple(token for token in ids if token not in inside)
        if pad is not None and not 0 <= pad < config.vocab_size:
            pad = None  # Llama 1's files have -1 for no padding token
        return cls(inside, pad, dict(fields), outside)

    @property
    def do_sample(self) -> bool:
        """Whether tokens are sampled by default."""
        return bool(self.fields.get("do_sample"))

    def default(self, name: str, otherwise: Any = None) -> Any:
        """The field `name`, moved into the range that `Sampling` takes, or `otherwise` if it is absent."""
        value: Any = self.fields.get(name)
        if name == "top_k" and type(value) in (bool, float) and value == 0:
            return 0
        if name == "top_p" and isinstance(value, int | float) and not isinstance(value, bool):
            # above 1 keeps everything; 0 keeps the likeliest token alone, as does any number close to it
            return 1.0 if value > 1 else 1e-30 if value == 0 else value
        return otherwise if value is None else value

    def sampling(
        self,
        *,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> Sampling:
        """How tokens are chosen. Arguments that are None come from the file, or else from transformers.

        Raises:
            ValueError: `do_sample` is not a bool.
        """
        if do_sample is None:
            do_sample = self.do_sample
        else:
            do_sample = plain_number(do_sample)
            if not isinstance(do_sample, bool):
                raise ValueError(f"do_sample: found {do_sample!r}, expected True or False")
        if do_sample:  # without it, the fields of the file may hold anything
            temperature = self.default("temperature") if temperature is None else temperature
            top_k = self.default("top_k", DEFAULT_TOP_K) if top_k is None else top_k
            top_p = self.default("top_p") if top_p is None else top_p
            min_p = self.default("min_p") if min_p is None else min_p
        if repetition_penalty is None:
            repetition_penalty = self.default("repetition_penalty")
        return Sampling(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            processors=tuple(logits_processors),
        )

    @property
    def unused(self) -> dict[str, Any]:
        """Options of sampling in a file without `do_sample`."""
        return {} if self.do_sample else self._set_fields(_SAMPLING_ONLY)

    @property
    def unimplemented(self) -> dict[str, Any]:
        """Fields that change which tokens transformers chooses and that are not implemented here."""
        fields = self._set_fields(_NEUTRAL)
        if not self.do_sample:
            fields = {name: value for name, value in fields.items() if name not in _SAMPLING_ONLY}
        return fields

    def _set_fields(self, neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """The fields whose value is neither null nor a neutral one."""
        return {
            name: self.fields[name]
            for name, values in neutral.items()
            if self.fields.get(name) not in (None, *values)
        }


def token_ids(value: Any) -> Any:
    """One or several token ids as integers; transformers accepts 2.0 and true for 2 and 1."""
    if isinstance(value, list):
        return [token_ids(token) for token in value]
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value


GENERATION_FILE = "generation_config.json"


def read_generation_config(directory: Path, config: LlamaConfig) -> GenerationConfig:
    """The directory's generation_config.json, with the ids of the model's `config` as defaults.

    Warns:
        UserWarning: end tokens outside the vocabulary; options of sampling without `do_sample`.
    """
    path = directory / GENERATION_FILE
    fields = read_json_object(path) if path.exists() else {}
    generation_config = GenerationConfig.from_dict(fields, config)
    if generation_config.outside:
        warnings.warn(
            f"{directory}: eos_token_id: found {list(generation_config.outside)} outside the vocabulary "
            f"of {config.vocab_size}; ignored",
            stacklevel=2,
        )
    if generation_config.unused:
        names = ", ".join(generation_config.unused)
        warnings.warn(
            f"{path}: {names} without do_sample: tokens are chosen greedily, as in transformers",
            stacklevel=2,
        )
    return generation_config
