"""A prompt that begins like the last one and its continuation: the same tokens, only the rest is run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import LlamaForCausalLM, PromptCache
from llama_jax.generation import loop
from parity_tests.harness.cases import BY_NAME, weights_of
from parity_tests.harness.programs import our_model

RNG = np.random.default_rng(3)
# of each turn: what the user says, and how many tokens are answered; the cache grows in the second
TURNS = [(RNG.integers(3, 60, said).tolist(), new) for said, new in ((7, 5), (21, 4), (2, 3))]


@pytest.fixture
def run_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prefill runs, without padding."""
    counts: list[int] = []
    prefill = loop._prefill

    def counting(model: Any, ids: Any, is_token: Any, *rest: Any, **more: Any) -> Any:
        counts.append(int(is_token.sum()))
        return prefill(model, ids, is_token, *rest, **more)

    monkeypatch.setattr(loop, "_prefill", counting)
    return counts


def model_of(name: str, layers: int = 1, **fields: Any) -> LlamaForCausalLM:
    """A model that never ends a text."""
    more = {"eos_token_id": None, "num_hidden_layers": layers} | fields
    config = BY_NAME[name].config | more
    return our_model(config, weights_of(config), jnp.float32)


def fresh(model: LlamaForCausalLM, prompt: list[int], new: int, **options: Any) -> list[int]:
    tokens = model.generate(jnp.asarray([prompt]), max_new_tokens=new, **options)
    return np.asarray(tokens)[0, len(prompt) :].tolist()


def continued(
    model: LlamaForCausalLM, prompt: list[int], new: int, kept: PromptCache, **options: Any
) -> list[int]:
    stream = model.stream(jnp.asarray([prompt]), max_new_tokens=new, prompt_cache=kept, **options)
    return [int(token[0]) for token in stream]


OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"cache_dtype": "int8"},
    "penalty": {"repetition_penalty": 1.5},
    "sampled": {"do_sample": True, "temperature": 0.8, "key": jax.random.key(4)},
    "processor": {
        "logits_processors": [
            lambda ids, logits, lengths: logits.at[:, ids[0, lengths[0] - 3]].set(-jnp.inf)
        ]
    },
}


@pytest.mark.parametrize("stacked", [False, True])
def test_each_turn_is_what_a_fresh_generation_says(
    stacked: bool, run_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if stacked:  # as on a GPU
        monkeypatch.setattr(loop, "can_unstack", lambda model: False)
    model, kept = model_of("gqa_2_to_1", layers=2, max_position_embeddings=128), PromptCache()
    prompt: list[int] = []
    for said, new in TURNS:
        prompt += said
        answer = continued(model, prompt, new, kept)
        # the last token of an answer was not run; it is with the next turn
        assert kept.tokens == [*prompt, *answer[:-1]]
        prompt += answer
    assert run_tokens == [7, 21 + 1, 2 + 1]
    # every answer is what one generation without a cache says to the whole conversation before it
    end = 0
    for said, new in TURNS:
        begin, end = end + len(said), end + len(said) + new
        assert fresh(model, prompt[:begin], new, cache_capacity=64) == prompt[begin:end]


@pytest.mark.parametrize("option", OPTIONS)
def test_what_was_said_before_counts(option: str) -> None:
    options = OPTIONS[option] | {"cache_capacity": 32}
    model, kept = model_of("tied", max_position_embeddings=128), PromptCache()
    prompt = [5, 9, 5, 7]
    prompt += [*continued(model, prompt, 5, kept, **options), 11, 5]
    assert continued(model, prompt, 9, kept, **options) == fresh(model, prompt, 9, **options)


@pytest.mark.filterwarnings("ignore:.*max_position_embeddings")
@pytest.mark.parametrize("name", ["rope_longrope_long", "rope_dynamic_past"])
def test_frequencies_that_depend_on_the_length(name: str) -> None:
    model, kept = model_of(name), PromptCache()
    limit = 16 if name == "rope_longrope_long" else model.config.max_position_embeddings
    short = list(range(3, limit))
    long = [*short, *continued(model, short, 6, kept, cache_capacity=64), 8]
    for prompt in (long, short):  # beyond the length, and below it again
        again = continued(model, prompt, 6, kept, cache_capacity=64)
        assert again == fresh(model, prompt, 6, cache_capacity=64)


def test_a_rewritten_turn_is_run_again(run_tokens: list[int]) -> None:
    model, kept = model_of("tied", max_position_embeddings=128), PromptCache()
    prompt = list(range(3, 19))
    answer = continued(model, prompt, 6, kept, cache_capacity=32)
    other = [*prompt[:12], 40, *prompt[13:], *answer, 8]
    # the second time all of it is known: the last token gives the logits
    for asked in (other, other, other[:15]):
        said = continued(model, asked, 6, kept, cache_capacity=32)
        assert said == fresh(model, asked, 6, cache_capacity=32)
    assert run_tokens == [16, 23 - 12, 23, 1, 23, 1, 15]


def test_an_answer_that_was_not_heard_to_the_end() -> None:
    model, kept = model_of("tied", max_position_embeddings=128), PromptCache()
    prompt = list(range(3, 19))
    stream = model.stream(
        jnp.asarray([prompt]), max_new_tokens=9, prompt_cache=kept, cache_capacity=32
    )
    heard = [int(next(stream)[0]) for _ in range(4)]
    stream.close()
    assert kept.tokens == [*prompt, *heard[:-1]]
    longer = [*prompt, *heard, 9]
    again = continued(model, longer, 5, kept, cache_capacity=32)
    assert again == fresh(model, longer, 5, cache_capacity=32)


def test_few_programs_are_compiled() -> None:
    model, kept = model_of("tied", max_position_embeddings=128), PromptCache()
    prompt = list(range(3, 35))
    prompt += continued(model, prompt, 5, kept)
    before = loop._prefill._cache_size(), loop._decode._cache_size()
    for said in (7, 1):
        prompt += list(range(5, 5 + said))
        prompt += continued(model, prompt, 5, kept)
    # one more, for up to 16 new tokens instead of 32
    assert loop._prefill._cache_size() <= before[0] + 1
    assert loop._decode._cache_size() == before[1]


@pytest.mark.parametrize("mask", [None, [[0, 1, 1]]])
def test_several_prompts_or_padding_are_refused(mask: list[list[int]] | None) -> None:
    model, rows = model_of("tied", max_position_embeddings=128), 2 if mask is None else 1
    stream = model.stream(
        jnp.full((rows, 3), 5),
        mask and jnp.asarray(mask),
        max_new_tokens=2,
        prompt_cache=PromptCache(),
    )
    with pytest.raises(ValueError, match="prompt_cache: it is for one prompt without padding"):
        next(stream)
