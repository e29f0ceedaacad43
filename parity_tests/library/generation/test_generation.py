"""Greedy tokens equal Hugging Face's `generate`; cached logits equal uncached ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread, current_thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from llama_jax import LlamaForCausalLM, init_cache
from llama_jax.generation import loop
from llama_jax.generation.sampling import Sampling
from parity_tests.harness.cases import BY_NAME, Config, hf_model, weights_of
from parity_tests.harness.child_process import output_lines
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.harness.programs import our_model
from parity_tests.reference.errors import relative_error
from parity_tests.reference.tolerances import FLOAT64_BAR
from train.hardware.flops import matmul_flops

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
    attention_mask = torch.from_numpy(np.ones_like(ids) if mask is None else mask)
    with torch.no_grad():
        theirs = hf_model(config, weights).generate(
            torch.from_numpy(ids),
            # Hugging Face guesses a mask from padding tokens unless it is told.
            attention_mask=attention_mask,
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


def test_a_row_ends_at_any_end_token_and_is_padded() -> None:
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
        uncached = run(model, ids, mask).logits
        for sizes in CHUNKS:
            cache, parts = init_cache(model.config, 2, 13, jnp.float64), []
            for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
                piece = slice(int(stop) - size, int(stop))
                out = run(model, ids[:, piece], mask[:, piece], cache)
                parts.append(out.logits)
                cache = out.cache
            assert int(cache.length) == 10
            assert relative_error(jnp.concatenate(parts, axis=1), uncached) <= FLOAT64_BAR, sizes


@pytest.mark.parametrize("dtype", ["float64", "int8"])
@pytest.mark.parametrize("seq", [10, 150])
def test_a_new_cache_is_as_one_of_unknown_length(dtype, seq) -> None:
    """Outside jit it is known to be empty, and only the tokens of the call are attended to."""
    with jax.enable_x64(True):
        config = BY_NAME["gqa_2_to_1"].config
        model = our_model(config, weights_of(config), jnp.float64)
        ids = jnp.asarray(prompts(config, 2, seq), jnp.int32)
        mask = jnp.asarray(left_padding(2, seq), jnp.int32)
        cache = init_cache(model.config, 2, seq + 20, jnp.dtype(dtype))
        known = model(ids, mask, cache=cache)
        traced = jax.jit(lambda model, cache: model(ids, mask, cache=cache))(model, cache)
        for ours, theirs in zip(jax.tree.leaves(known), jax.tree.leaves(traced), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_a_prefill_computes_no_scores_of_unused_slots() -> None:
    model = tiny_model()
    ids = np.ones((1, 256), np.int32)
    ending = loop.Ending(np.zeros(0, np.int32), np.asarray(0, np.int32))

    def flops(capacity: int) -> float:
        def prefill(model: LlamaForCausalLM) -> Any:
            return loop._prefill(
                model,
                ids,
                ids.astype(bool),
                np.asarray(256, np.int32),
                None,
                Sampling(),
                ending,
                None,
                capacity=capacity,
                cache_dtype=jnp.dtype(jnp.float32),
                unstacked=False,
                output_scores=False,
            )

        return matmul_flops(jax.make_jaxpr(prefill)(model).jaxpr)

    assert flops(2048) == flops(257)


def test_generation_is_the_argmax_of_uncached_logits() -> None:
    """The compiled loop against the plain forward pass, without Hugging Face."""
    config = BY_NAME["rope_yarn"].config | ENDLESS
    model = our_model(config, weights_of(config), jnp.float32)
    ids = jnp.asarray(prompts(config, 2, 5), jnp.int32)
    generated = model.generate(ids, max_new_tokens=6)
    logits = model(generated[:, :-1]).logits
    np.testing.assert_array_equal(generated[:, 5:], jnp.argmax(logits[:, 4:], axis=-1))


def tiny_model(name: str = "gqa_2_to_1") -> LlamaForCausalLM:
    config = BY_NAME[name].config | ENDLESS
    return our_model(config, weights_of(config), jnp.float32)


def test_the_same_key_samples_the_same_tokens() -> None:
    model, ids = tiny_model(), jnp.asarray(prompts(BY_NAME["gqa_2_to_1"].config, 2, 5), jnp.int32)

    def draw(seed: int) -> list[list[int]]:
        key = jax.random.key(seed)
        return model.generate(ids, max_new_tokens=10, do_sample=True, top_k=0, key=key).tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    only = model.generate(ids, max_new_tokens=10, do_sample=True, top_k=1, key=jax.random.key(0))
    np.testing.assert_array_equal(only, model.generate(ids, max_new_tokens=10))
    with pytest.raises(ValueError, match=r"key: found None"):
        model.generate(ids, max_new_tokens=2, do_sample=True)


def test_repetition_penalty_and_scores_equal_hugging_face() -> None:
    config = BY_NAME["gqa_2_to_1"].config | ENDLESS
    ids, mask = prompts(config, 2, 7), left_padding(2, 7)
    with torch.no_grad():
        theirs = hf_model(config, weights_of(config)).generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=NEW,
            do_sample=False,
            repetition_penalty=1.7,
            return_dict_in_generate=True,
            output_scores=True,
        )
    ours = tiny_model().generate(
        ids, mask, max_new_tokens=NEW, repetition_penalty=1.7, output_scores=True
    )
    np.testing.assert_array_equal(ours.sequences, theirs.sequences.numpy())
    want = torch.stack(theirs.scores, dim=1).numpy()
    np.testing.assert_allclose(ours.scores, want, rtol=1e-4, atol=1e-5)


def test_stream_equals_generate_and_compiles_once() -> None:
    model, ids = tiny_model(), jnp.asarray(prompts(BY_NAME["gqa_2_to_1"].config, 2, 5), jnp.int32)
    generated = model.generate(ids, max_new_tokens=9)
    with _no_compilation():
        streamed = np.stack(list(model.stream(ids, max_new_tokens=9)), axis=1)
        np.testing.assert_array_equal(generated[:, 5:], streamed)
        # of the same buckets: other lengths of prompt and continuation
        model.generate(jnp.asarray(np.asarray(ids)[:, :4]), max_new_tokens=7).block_until_ready()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[Thread]:
    """The threads that `stream` begins."""
    threads: list[Thread] = []

    def thread(**options: Any) -> Thread:
        threads.append(Thread(**options))
        return threads[-1]

    monkeypatch.setattr(loop, "Thread", thread)
    return threads


def test_stream_compiles_its_step_in_a_thread(compiling: list[Thread]) -> None:
    """Once, and the tokens are those of `generate`, which does so when it calls the step."""
    model, ids = tiny_model(), jnp.asarray(prompts(BY_NAME["gqa_2_to_1"].config, 1, 5), jnp.int32)
    compiled: list[str] = []

    def listen(event: str, seconds: float, **facts: str | int) -> None:
        del seconds
        if event.endswith("backend_compile_duration"):
            compiled.append(str(facts.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        streamed = list(model.stream(ids, max_new_tokens=6, cache_capacity=21))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    (thread,) = compiling
    assert not thread.is_alive()
    assert sum("_decode" in name for name in compiled) == 1
    jax.clear_caches()
    generated = model.generate(ids, max_new_tokens=6, cache_capacity=21)
    np.testing.assert_array_equal(np.stack(streamed, axis=1), generated[:, 5:])
    assert list(model.stream(ids, max_new_tokens=1))
    assert len(compiling) == 2
    assert compiling[1].ident is None  # it has nothing to do


def test_an_error_of_that_thread_is_raised_when_the_step_is_called(compiling: list[Thread]) -> None:
    model, ids = tiny_model(), jnp.asarray(prompts(BY_NAME["gqa_2_to_1"].config, 1, 5), jnp.int32)
    calls: list[str] = []

    def processor(tokens: Any, scores: Any, lengths: Any) -> Any:
        calls.append(current_thread().name)
        if len(calls) > 1:
            raise ValueError("not twice")
        return scores

    stream = model.stream(ids, max_new_tokens=6, logits_processors=[processor])
    next(stream)
    with pytest.raises(ValueError, match="not twice"):
        next(stream)
    (thread,) = compiling
    assert not thread.is_alive()
    assert thread.name in calls


def test_the_thread_of_a_stream_that_is_dropped_ends(compiling: list[Thread]) -> None:
    model, ids = tiny_model(), jnp.asarray(prompts(BY_NAME["gqa_2_to_1"].config, 1, 5), jnp.int32)
    stream = model.stream(ids, max_new_tokens=6, cache_capacity=23)
    next(stream)
    stream.close()
    (thread,) = compiling
    thread.join(timeout=120)
    assert not thread.is_alive()


@contextmanager
def _no_compilation() -> Iterator[None]:
    """No program of `generation.loop` is compiled."""
    programs = (loop._prefill, loop._decode)
    before = [program._cache_size() for program in programs]
    yield
    assert [program._cache_size() for program in programs] == before


def test_an_int8_cache_is_close() -> None:
    config = BY_NAME["gqa_2_to_1"].config | ENDLESS
    model, ids = tiny_model(), jnp.asarray(prompts(config, 2, 10), jnp.int32)
    uncached = model(ids).logits
    out = model(ids, cache=init_cache(model.config, 2, 12, jnp.int8))
    assert out.cache.keys.values.dtype == jnp.int8
    assert 0 < relative_error(out.logits, uncached) < 0.02
    assert model.generate(ids, max_new_tokens=4, cache_dtype="int8").shape == (2, 14)


def test_a_custom_logits_processor() -> None:
    model, ids = tiny_model(), jnp.asarray(prompts(BY_NAME["gqa_2_to_1"].config, 2, 5), jnp.int32)

    def newest_again(input_ids: jax.Array, logits: jax.Array, lengths: jax.Array) -> jax.Array:
        newest = jnp.take_along_axis(input_ids, lengths[:, None] - 1, axis=1)
        return jnp.where(jnp.arange(logits.shape[1])[None] == newest, logits, -jnp.inf)

    out = model.generate(ids, max_new_tokens=3, logits_processors=[newest_again])
    np.testing.assert_array_equal(out[:, 5:], np.repeat(ids[:, -1:], 3, axis=1))


@pytest.mark.parametrize(
    ("length", "padded"),
    [(5, False), (5, True), pytest.param(16, True, marks=pytest.mark.slow), (17, False)],
)
def test_a_logits_processor_sees_the_same_tokens_as_in_transformers(length, padded) -> None:
    """Of prompts that fill their bucket and that do not; left padding alone is not shown."""
    config = BY_NAME["gqa_2_to_1"].config | ENDLESS
    ids = prompts(config, 3, length)
    mask = left_padding(3, length) if padded else np.ones_like(ids)
    theirs: list[list[list[int]]] = []
    ours: list[list[list[int]]] = []

    def record_theirs(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        skipped = (mask == 0).sum(1)
        theirs.append([row[skip:].tolist() for row, skip in zip(input_ids, skipped, strict=True)])
        return scores

    def record_ours(input_ids: jax.Array, logits: jax.Array, lengths: jax.Array) -> jax.Array:
        def record(ids: np.ndarray, counts: np.ndarray) -> None:
            rows = zip(np.asarray(ids), np.asarray(counts), strict=True)
            ours.append([row[:count].tolist() for row, count in rows])

        jax.debug.callback(record, input_ids, lengths, ordered=True)
        return logits

    with torch.no_grad():
        hf_model(config, weights_of(config)).generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=4,
            do_sample=False,
            logits_processor=LogitsProcessorList([record_theirs]),
        )
    tiny_model().generate(ids, mask, max_new_tokens=4, logits_processors=[record_ours])
    jax.effects_barrier()
    assert len(theirs) == 4
    assert ours == theirs


def test_the_repetition_penalty_ignores_padding() -> None:
    """Whatever the padding token is; transformers penalizes that token, too."""
    model, ids = tiny_model(), prompts(BY_NAME["gqa_2_to_1"].config, 2, 7)
    alone = model.generate(
        ids[1:, 3:], max_new_tokens=4, repetition_penalty=1.7, output_scores=True
    )
    ids[1, :3] = int(alone.sequences[0, -1])
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    beside = model.generate(ids, mask, max_new_tokens=4, repetition_penalty=1.7, output_scores=True)
    np.testing.assert_array_equal(beside.sequences[1, 7:], alone.sequences[0, 4:])
    np.testing.assert_allclose(beside.scores[1], alone.scores[0], rtol=1e-4, atol=1e-5)


def test_a_sharded_model_generates_the_same_tokens() -> None:
    assert output_lines("workers.sharded_generation") == ["same"]


@pytest.mark.parametrize("size", range(1, 3000, 37))
def test_a_bucket_wastes_at_most_an_eighth(size: int) -> None:
    bucket = loop.bucket(size)
    assert size <= bucket <= max(16, 1.13 * size + 16 * (size < 128))
    assert loop.bucket(bucket) == bucket
