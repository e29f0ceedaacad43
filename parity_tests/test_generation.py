"""P6: greedy tokens equal Hugging Face's `generate`; cached logits equal uncached ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax import init_cache
from parity_tests.cases import BY_NAME, Config, hf_model, weights_of
from parity_tests.measure import relative_error
from parity_tests.programs import FAST_COMPILE, our_model
from parity_tests.test_model import P1

NEW = 12


def prompts(config: Config, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(7).integers(3, config["vocab_size"], (batch, length))


def left_padding(batch: int, length: int) -> np.ndarray:
    """A mask whose rows are padded by 0, 2, 4, .. tokens."""
    return (np.arange(length) >= 2 * np.arange(batch)[:, None]).astype(np.int64)


def both_generate(
    config: Config, ids: np.ndarray, mask: np.ndarray | None, new: int = NEW
) -> tuple[np.ndarray, np.ndarray]:
    weights = weights_of(config)
    given = None if mask is None else torch.from_numpy(mask)
    with torch.no_grad():
        theirs = hf_model(config, weights).generate(
            torch.from_numpy(ids),
            # Hugging Face guesses a mask from padding tokens unless it is told.
            attention_mask=torch.ones_like(torch.from_numpy(ids)) if given is None else given,
            max_new_tokens=new,
            do_sample=False,
        )
    ours = our_model(config, weights, jnp.float32).generate(
        jnp.asarray(ids, jnp.int32),
        attention_mask=None if mask is None else jnp.asarray(mask, jnp.int32),
        max_new_tokens=new,
    )
    return np.asarray(ours), theirs.numpy()


ENDLESS = {"eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        ("gqa_2_to_1", False),
        ("rope_dynamic_past", False),
        ("mqa", True),
        ("tied", True),
        ("rope_dynamic_past", True),
        ("rope_yarn", True),
        ("rope_longrope_long", True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*max_position_embeddings")
def test_greedy_tokens_equal_hugging_face(name: str, padded: bool) -> None:
    """Contexts of 16 are crossed on the way from 9 to 21 tokens."""
    config = BY_NAME[name].config | ENDLESS
    ids = prompts(config, batch=3, length=9)
    ours, theirs = both_generate(config, ids, left_padding(3, 9) if padded else None)
    assert theirs.shape == (3, 9 + NEW)
    np.testing.assert_array_equal(ours, theirs)


def test_a_row_ends_at_any_of_its_end_tokens_and_is_padded() -> None:
    config = BY_NAME["gqa_2_to_1"].config | ENDLESS
    ids, mask = prompts(config, batch=3, length=6), left_padding(3, 6)
    _, endless = both_generate(config, ids, mask)
    # End tokens are chosen so that the rows end at different times, for different reasons.
    ends = [int(endless[0, 6 + 2]), int(endless[1, 6 + 5])]
    ours, theirs = both_generate(config | {"eos_token_id": ends}, ids, mask)
    lengths = (theirs != 0).sum(1)
    assert len(set(lengths)) > 1, "rows which end together show nothing"
    np.testing.assert_array_equal(ours, theirs)


def test_generation_stops_when_every_row_has_ended() -> None:
    config = BY_NAME["gqa_2_to_1"].config | ENDLESS
    ids = prompts(config, batch=1, length=6)
    _, endless = both_generate(config, ids, None)
    ours, theirs = both_generate(config | {"eos_token_id": int(endless[0, 6 + 3])}, ids, None)
    assert theirs.shape[1] < 6 + NEW
    np.testing.assert_array_equal(ours, theirs)


def test_one_new_token() -> None:
    config = BY_NAME["gqa_2_to_1"].config | ENDLESS
    ours, theirs = both_generate(config, prompts(config, 2, 5), None, new=1)
    np.testing.assert_array_equal(ours, theirs)


CHUNKS = [[10], [1] * 10, [4, 3, 3], [7, 1, 1, 1]]


@pytest.mark.parametrize("name", ["gqa_2_to_1", "rope_llama31", "everything"])
def test_cached_logits_equal_uncached_ones(name: str) -> None:
    """All at once, token by token, in chunks: with padding, and room to spare in the cache."""
    config = BY_NAME[name].config
    run = jax.jit(
        lambda model, ids, mask, cache=None: model(ids, attention_mask=mask, cache=cache),
        compiler_options=FAST_COMPILE,
    )
    with jax.enable_x64(True):
        model = our_model(config, weights_of(config), jnp.float64)
        ids = jnp.asarray(prompts(config, batch=2, length=10), jnp.int32)
        mask = jnp.asarray(left_padding(2, 10), jnp.int32)
        whole = run(model, ids, mask).logits
        for sizes in CHUNKS:
            cache, parts = init_cache(model.config, 2, 13, jnp.float64), []
            for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
                piece = slice(int(stop) - size, int(stop))
                out = run(model, ids[:, piece], mask[:, piece], cache)
                parts.append(out.logits)
                cache = out.cache
            assert int(cache.length) == 10
            assert relative_error(jnp.concatenate(parts, axis=1), whole) <= P1, sizes


def test_generation_is_the_argmax_of_uncached_logits() -> None:
    """The compiled loop against the plain forward pass, without Hugging Face."""
    config = BY_NAME["rope_yarn"].config | ENDLESS
    model = our_model(config, weights_of(config), jnp.float32)
    ids = jnp.asarray(prompts(config, 2, 5), jnp.int32)
    generated = model.generate(ids, max_new_tokens=6)
    logits = model(generated[:, :-1]).logits
    np.testing.assert_array_equal(generated[:, 5:], jnp.argmax(logits[:, 4:], axis=-1))
