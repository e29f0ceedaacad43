"""`generation_config.json`: what ends a generation, and how its tokens are chosen unless told otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_jax.config import LlamaConfig, require_tokens

# fields that steer which tokens are chosen and are not implemented, and the values that leave it alone
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "typical_p": (1.0,),
}


@dataclass(frozen=True)
class GenerationConfig:
    """A `generation_config.json`: what ends and pads a generation, and fields kept to be written back."""

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], config: LlamaConfig) -> "GenerationConfig":
        """Read the ids from `fields`, or from the model's config where the file leaves them out."""
        eos = fields.get("eos_token_id")
        eos = config.eos_token_ids if eos is None else eos
        pad = fields.get("pad_token_id")
        pad = config.pad_token_id if pad is None else pad
        require_tokens("generation_config: eos_token_id", eos, several=True)
        require_tokens("generation_config: pad_token_id", pad, several=False)
        return cls((eos,) if isinstance(eos, int) else tuple(eos), pad, dict(fields))

    def default(self, name: str, otherwise: Any) -> Any:
        """The field, or `otherwise` where the file leaves it out."""
        found = self.fields.get(name)
        return otherwise if found is None else found

    @property
    def unheeded(self) -> dict[str, Any]:
        """Fields that change the tokens in transformers and are not implemented here."""
        return {
            name: self.fields[name]
            for name, neutral in _NEUTRAL.items()
            if self.fields.get(name) not in (None, *neutral)
        }
