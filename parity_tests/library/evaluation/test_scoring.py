"""Log-probabilities of tokens: exact in float64, as accurate as PyTorch's, independent of the batch."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.__main__ import main
from llama_jax.evaluation import scoring
from llama_jax.evaluation.scoring import (
    _hidden,
    encode_pair,
    loglikelihood,
    loglikelihood_rolling,
    prefix_token,
    rolling_windows,
    token_log_probs,
    token_scores,
)
from llama_jax.text.encode import encode_text
from llama_jax.text.tokenizer import model_json
from parity_tests.harness.cases import BASE, BY_NAME, hf_model, weights_of
from parity_tests.harness.programs import our_model
from parity_tests.harness.tiny_tokenizers import CORPUS, sentencepiece_model, tiktoken_model
from parity_tests.reference.errors import relative_error, rms_error
from parity_tests.reference.oracle import oracle
from parity_tests.reference.tolerances import FLOAT64_BAR, ROUNDING_RATIO

CONFIG = BASE | {"num_hidden_layers": 1}


def texts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG["vocab_size"], length).tolist() for length in lengths]


def log_probs_of(logits: torch.Tensor, ids: list[int]) -> np.ndarray:
    """torch's log_softmax of each token but the first, from the logits of all but the last."""
    chosen = torch.log_softmax(logits[0], -1).gather(-1, torch.tensor(ids[1:])[:, None])
    return chosen[:, 0].detach().numpy()


@pytest.mark.parametrize("name", ["tied", "rope_longrope_long"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_float64_scores_in_any_batch(name: str, batch_size: int) -> None:
    """Scores depend neither on padding nor on the batch, even if rope depends on lengths."""
    config = BY_NAME[name].config | {"num_hidden_layers": 1, "max_position_embeddings": 64}
    sequences = texts(0, (5, 20, 2, 12, 20, 16))
    weights = weights_of(config)
    with jax.enable_x64(True):
        model = our_model(config, weights, jnp.float64)
        got = token_scores(model, sequences, batch_size=batch_size)
    for ids, scores in zip(sequences, got, strict=True):
        assert scores.log_probs.dtype == np.float64
        assert len(scores.log_probs) == len(scores.greedy) == len(ids) - 1
        logits = oracle(config, weights, input_ids=torch.tensor([ids[:-1]])).logits
        assert relative_error(scores.log_probs, log_probs_of(logits, ids)) <= FLOAT64_BAR
        assert scores.greedy.tolist() == (logits[0].argmax(-1) == torch.tensor(ids[1:])).tolist()


def test_float32_is_as_accurate_as_log_softmax() -> None:
    ours, theirs, exact = [], [], []
    for seed in range(8):
        weights = weights_of(CONFIG, seed)
        model, hf = our_model(CONFIG, weights, jnp.float32), hf_model(CONFIG, weights)
        sequences = texts(seed, (24, 31, 9, 33))
        for ids, scores in zip(sequences, token_scores(model, sequences), strict=True):
            tokens = torch.tensor([ids[:-1]])
            ours.append(scores.log_probs)
            theirs.append(log_probs_of(hf(tokens).logits, ids))
            exact.append(log_probs_of(oracle(CONFIG, weights, input_ids=tokens).logits, ids))
    mine, hugging_face = rms_error(ours, exact), rms_error(theirs, exact)
    print(f"log-probs: rms error {mine:.3e}, torch {hugging_face:.3e} x {mine / hugging_face:.2f}")
    assert mine <= ROUNDING_RATIO * hugging_face


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return our_model(CONFIG, weights_of(CONFIG), jnp.float32)


def test_greedily_generated_tokens_are_greedy(model: LlamaForCausalLM) -> None:
    (context,) = texts(1, (6,))
    written = model.generate(np.array([context]), max_new_tokens=5, eos_token_id=[])[0, 6:].tolist()
    other = [*written[:-1], (written[-1] + 1) % CONFIG["vocab_size"]]
    likeliest, second = loglikelihood(model, [(context, written), (context, other)])
    assert likeliest.is_greedy
    assert not second.is_greedy
    assert second.greedy.tolist() == [True, True, True, True, False]
    assert likeliest.total > second.total
    assert likeliest.total == pytest.approx(likeliest.log_probs.sum(), rel=1e-6)


def test_a_continuation_is_scored_like_the_end_of_the_sequence(model: LlamaForCausalLM) -> None:
    pairs = [(ids[:cut], ids[cut:]) for ids, cut in zip(texts(2, (9, 20)), (1, 15), strict=True)]
    complete = token_scores(model, [c + t for c, t in pairs])
    for (_, target), got, want in zip(pairs, loglikelihood(model, pairs), complete, strict=True):
        assert np.array_equal(got.log_probs, want.log_probs[-len(target) :])


@pytest.mark.parametrize("name", ["tied", "rope_longrope_long", "rope_dynamic_past"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_continuations_of_one_context_in_float64(
    name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of several lengths, which are run once; and one that has a single continuation."""
    config = BY_NAME[name].config | {"num_hidden_layers": 1, "max_position_embeddings": 64}
    contexts = texts(3, (5, 20, 14, 1))
    lengths = ((1, 4, 2, 1), (3, 1, 1), (1, 5), (2,))
    pairs = [
        (context, continuation)
        for number, (context, sizes) in enumerate(zip(contexts, lengths, strict=True))
        for continuation in texts(10 + number, sizes)
    ]
    pairs = pairs[::2] + pairs[1::2]
    weights = weights_of(config)
    run = 0

    def count_tokens(model: LlamaForCausalLM, ids: Any, positions: Any, visible_until: Any) -> Any:
        nonlocal run
        run += int((visible_until >= 0).sum())
        return _hidden(model, ids, positions, visible_until)

    monkeypatch.setattr(scoring, "_hidden", count_tokens)
    with jax.enable_x64(True):
        got = loglikelihood(our_model(config, weights, jnp.float64), pairs, batch_size=batch_size)
    for (context, continuation), scores in zip(pairs, got, strict=True):
        ids = [*context, *continuation]
        logits = oracle(config, weights, input_ids=torch.tensor([ids[:-1]])).logits
        expected = log_probs_of(logits, ids)[-len(continuation) :]
        assert relative_error(scores.log_probs, expected) <= FLOAT64_BAR
        greedy = (logits[0].argmax(-1) == torch.tensor(ids[1:])).tolist()
        assert scores.greedy.tolist() == greedy[-len(continuation) :]
    # every context once, and of each continuation all but the last token; beyond 16 tokens, longrope has
    # other frequencies
    again = 14 if name == "rope_longrope_long" else 0
    assert run == (5 + 3 + 1) + (20 + 2) + (14 + 4) + again + (1 + 1)


@settings(deadline=None)
@given(count=st.integers(1, 60), length=st.integers(1, 20))
def test_rolling_windows_score_each_token_once(count: int, length: int) -> None:
    tokens = list(range(100, 100 + count))
    windows = rolling_windows(tokens, 7, length)
    assert [token for _, target in windows for token in target] == tokens
    assert windows[0][0] == [7]
    for index, (context, target) in enumerate(windows):
        assert len(context) + len(target) - 1 <= length  # the last token is not fed
        if index:
            # what is seen comes right before what is scored, and fills the window
            assert context + target == tokens[target[-1] - 100 - length : target[-1] - 99]


def test_a_short_text_is_scored_after_the_prefix(model: LlamaForCausalLM) -> None:
    short, long = texts(3, (10, 50))
    got = loglikelihood_rolling(model, [short, long], prefix_token_id=4, max_length=16)
    assert np.allclose(got[0].log_probs, token_scores(model, [[4, *short]])[0].log_probs, atol=1e-5)
    assert len(got[1].log_probs) == 50
    second = token_scores(model, [long[15:32]])[0].log_probs
    assert np.allclose(got[1].log_probs[16:32], second, atol=1e-5)
    by_config = loglikelihood_rolling(model, [short])  # the config's bos
    assert by_config[0].total == pytest.approx(token_scores(model, [[1, *short]])[0].total, 1e-5)


def test_logits_of_all_tokens_never_exist() -> None:
    tokens, vocab, chunk = 4096, 1024, 128
    shapes = [(tokens, 8), (vocab, 8)]
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    compiled = jax.jit(token_log_probs, static_argnums=3).lower(hidden, head, targets, chunk)
    held = compiled.compile().memory_analysis().temp_size_in_bytes
    assert held < 4 * tokens * vocab / 4  # a quarter of the logits


def test_few_programs_are_compiled(model: LlamaForCausalLM) -> None:
    before = _hidden._cache_size()
    token_scores(model, texts(4, tuple(range(2, 60))), batch_size=4)
    assert _hidden._cache_size() - before <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: token_scores(m, [[1, 2], []]), "sequence 1: found no tokens"),
        (lambda m: token_scores(m, [[1] * 66]), "sequence 0: found 66 tokens, expected at most 65"),
        (lambda m: token_scores(m, [[1, 61]]), "sequence 0: found token 61, expected 0 to 60"),
        (lambda m: loglikelihood(m, [([], [1])]), "context 0: found no tokens"),
        (lambda m: loglikelihood(m, [([1], [])]), "continuation 0: found no tokens"),
        (lambda m: loglikelihood_rolling(m, [[]]), "sequence: found no tokens"),
        (
            lambda m: loglikelihood_rolling(m, [[1]], max_length=65),
            "max_length: found 65, expected",
        ),
    ],
)
def test_bad_requests(model: LlamaForCausalLM, call: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(model)
    assert message in str(caught.value)


# Pairs and windows, by lm-evaluation-harness's definitions -----------------------------------------


def harness_pair(encode: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """TemplateLM._encode_pair of a causal model, from its definition."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    complete, first = encode(context + continuation), encode(context)
    return first, complete[len(first) :]


def harness_windows(
    tokens: list[int], prefix: int, length: int
) -> list[tuple[list[int], list[int]]]:
    """get_rolling_token_windows (context_len 1), then make_disjoint_window, from their definitions."""
    size = min(length, len(tokens))
    windows = [([prefix, *tokens[: size - 1]], tokens[:size])]
    done = size
    while done < len(tokens):
        end = done + min(len(tokens) - done, length)
        windows.append((tokens[end - length - 1 : end - 1], tokens[done:end]))
        done = end
    return [(a[: len(a) - (len(b) - 1)], b) for a, b in windows]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16])
def test_rolling_windows_match_lm_evaluation_harness(length: int) -> None:
    for count in range(1, 50):
        tokens = list(range(100, 100 + count))
        assert rolling_windows(tokens, 7, length) == harness_windows(tokens, 7, length)


def tiny(name: str, before: str = "", after: str = "") -> Tokenizer:
    content = sentencepiece_model() if name == "sentencepiece" else tiktoken_model()
    tokenizer = Tokenizer.from_str(json.dumps(model_json(content, add_bos=False)))
    around = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=around
        )
    return tokenizer


SPECIAL = {"sentencepiece": ("<s>", "</s>"), "tiktoken": ("<|begin_of_text|>", "<|end_of_text|>")}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("bos", [True, False])
def test_pairs_match_lm_evaluation_harness(name: str, bos: bool) -> None:
    first = SPECIAL[name][0] if bos else ""
    tokenizer, ending = tiny(name, first), tiny(name, first, SPECIAL[name][1])
    theirs = PreTrainedTokenizerFast(tokenizer_object=tiny(name, first), bos_token=first or None)
    same = 0
    for text in dict.fromkeys(CORPUS):
        for cut in range(1, len(text)):
            context, continuation = text[:cut], text[cut:]
            pair = encode_pair(tokenizer, context, continuation)
            assert [*pair[0], *pair[1]] == theirs.encode(text)
            assert encode_pair(ending, context, continuation) == pair
            expected = harness_pair(theirs.encode, context, continuation)
            if [*expected[0], *expected[1]] == theirs.encode(text):
                same += 1
                assert pair == expected
            else:  # its rule loses a token that spans the boundary
                assert len(pair[1]) > len(expected[1])
    assert same > 100


@pytest.mark.parametrize("name", SPECIAL)
def test_a_token_that_spans_the_boundary_is_scored(name: str) -> None:
    bos = SPECIAL[name][0]
    tokenizer, with_bos = tiny(name), tiny(name, bos)
    complete = tokenizer.encode("the cat").ids
    prefix = tokenizer.token_to_id(bos)
    assert encode_pair(tokenizer, "t", "he cat", prefix_token_id=5) == ([5], complete)
    assert encode_pair(tokenizer, "t", "he cat") == ([], complete)
    assert encode_pair(with_bos, "t", "he cat") == ([prefix], complete)


@pytest.mark.parametrize("name", SPECIAL)
def test_an_empty_context_becomes_the_prefix_token(name: str) -> None:
    bos, eos = SPECIAL[name]
    for tokenizer in (tiny(name), tiny(name, bos), tiny(name, bos, eos)):
        ids = tokenizer.encode("the cat", add_special_tokens=False).ids
        assert encode_pair(tokenizer, "", "the cat", prefix_token_id=5) == ([5], ids)
        first = tokenizer.token_to_id(bos)
        assert encode_pair(tokenizer, "", "the cat", prefix_token_id=first) == ([first], ids)
        # a prefix that is in the text already comes once
        pair = encode_pair(tokenizer, "", f"{bos}the cat", prefix_token_id=first)
        assert pair == (
            [first],
            tokenizer.encode(f"{bos}the cat", add_special_tokens=False).ids[1:],
        )
        spaced = tokenizer.encode(" the cat", add_special_tokens=False).ids
        assert encode_pair(tokenizer, " ", "the cat", prefix_token_id=first) == ([first], spaced)


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_are_added_once_and_only_before(name: str) -> None:
    bos, eos = SPECIAL[name]
    tokenizer = tiny(name, bos, eos)
    first, last = map(tokenizer.token_to_id, (bos, eos))
    ids = tokenizer.encode("the cat", add_special_tokens=False).ids
    assert encode_text(tokenizer, "the cat") == ([first], ids)
    assert encode_text(tokenizer, f"{bos}the cat").before == []
    assert encode_text(tokenizer, bos) == ([], [first])
    assert encode_text(tokenizer, eos) == ([first], [last])  # what the text says itself stays
    assert encode_text(tokenizer, "") == ([], [])
    assert encode_pair(tokenizer, f"{bos}the", f" cat{eos}")[0][:2] != [first, first]
    assert encode_pair(tokenizer, "the", f" cat{eos}")[1][-1] == last


def test_truncation_and_padding_are_ignored() -> None:
    tokenizer = tiny("tiktoken", "<|begin_of_text|>", "<|end_of_text|>")
    expected = encode_pair(tokenizer, "the capital of", " France is Paris")
    tokenizer.enable_truncation(4, stride=1, direction="left")
    tokenizer.enable_padding(length=40, pad_id=3, direction="left")
    told = tokenizer.truncation, tokenizer.padding
    assert encode_pair(tokenizer, "the capital of", " France is Paris") == expected
    assert (tokenizer.truncation, tokenizer.padding) == told


def test_the_prefix_token_is_bos_else_eos() -> None:
    for ids, expected in (
        ({"bos_token_id": 4, "eos_token_id": 5}, 4),
        ({"eos_token_id": [6, 5]}, 6),
    ):
        assert prefix_token(LlamaConfig(**{"bos_token_id": None, **ids})) == expected
    assert prefix_token(LlamaConfig(bos_token_id=None, eos_token_id=None)) is None


@pytest.mark.parametrize(
    ("special_tokens", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, 1),
        ({"eos_token": "</s>"}, 2),
        ({"bos_token": "<absent>"}, 4),
        ({}, 4),
    ],
)
def test_the_tokenizers_prefix_token_takes_precedence(
    special_tokens: dict[str, str], expected: int
) -> None:
    """As HFLM.prefix_token_id: the tokenizer's bos, else its eos; the config only has to help out."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    config = LlamaConfig(bos_token_id=4, eos_token_id=5)
    assert prefix_token(config, tokenizer, special_tokens) == expected


# The command -------------------------------------------------------------------------------------

WORDS = ["<unk>", "<s>", *["the", "capital", "of", "France", "is", "Paris", "and", "a", "b", "c"]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("score") / "model"
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def score(directory: Path, *arguments: str) -> int:
    return main(["score", "--model", str(directory), *arguments])


def test_score_prints_each_token(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(directory, "--text", "the capital of", "Paris is") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for part in ("capital", "of", "is", "over 2 tokens", "over 1 tokens", "perplexity"):
        assert part in captured.out
    assert max(map(len, captured.out.splitlines())) <= 80


def test_score_of_a_file_as_json(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("the capital of\nParis is a b\n")
    assert score(directory, "--file", str(file), "--json", "--batch-size", "1") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = LlamaForCausalLM.from_pretrained(directory)
    for row, text in zip(rows, ("the capital of", "Paris is a b"), strict=True):
        ids = [WORDS.index(word) for word in text.split()]
        (want,) = token_scores(model, [ids])
        assert row["text"] == text
        assert row["ids"] == ids[1:]
        assert row["tokens"] == text.split()[1:]
        assert np.allclose(row["log_probs"], want.log_probs, atol=1e-5)
        assert row["log_prob"] == pytest.approx(want.total, rel=1e-5)
        assert row["is_greedy"] == want.is_greedy


def test_score_after_a_context(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(directory, "--context", "the capital of", "--text", " France is", "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert score(directory, "--text", "the capital of France is", "--json") == 0
    complete = json.loads(capsys.readouterr().out)
    assert after["tokens"] == ["France", "is"]
    assert np.allclose(after["log_probs"], complete["log_probs"][-2:], atol=1e-5)


def test_score_of_a_long_text(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(directory, "--rolling", "--json", "--text", " ".join("abc" * 20)) == 0
    assert len(json.loads(capsys.readouterr().out)["log_probs"]) == 60


def test_spaces_before_a_continuation_belong_to_it() -> None:
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    context, continuation = encode_pair(tokenizer, "the capital ", "of France")
    assert [WORDS[n] for n in context] == ["<s>", "the", "capital"]
    assert [WORDS[n] for n in continuation] == ["of", "France"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", ""], "--text: found an empty text"),
        (["--text", "\udcff"], "--text: found bytes that are not UTF-8"),
        (["--text", " "], "text 1: tokenizes to no tokens, expected at least one"),
        (["--text", "a"], "text 1: it is a single token, with nothing before it"),
        (
            ["--text", "a b", " ".join("abc" * 6)],
            "text 2: found 18 tokens, expected at most 17 for",
        ),
        (["--context", "a", "--text", " "], "text 1: tokenizes to no tokens"),
        (["--context", " ", "--text", "a"], "--context: tokenizes to no tokens"),
        (
            ["--context", "a", "--rolling", "--text", "b"],
            "--rolling and --context exclude each other",
        ),
        (["--text", "a b", "--file", "x"], "not allowed with argument"),
        ([], "one of the arguments --text --file is required"),
        (["--file", "/absent/file"], "No such file"),
        (["--text", "a b", "--batch-size", "0"], "--batch-size: found '0'"),
    ],
)
def test_score_with_bad_options(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert score(directory, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"a b\n\nc", "line 2: the line is empty"),
        (b"\xff", "UTF-8"),
    ],
)
def test_score_of_a_bad_file(
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    (tmp_path / "texts").write_bytes(content)
    assert score(directory, "--file", str(tmp_path / "texts")) == 2
    assert message in capsys.readouterr().err


def test_score_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(tmp_path / "absent", "--text", "a b") == 2
    assert capsys.readouterr().err.endswith("absent: no such directory\n")


def test_an_appended_end_of_text_is_not_scored(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", 0)]
    )
    tokenizer.save(str(copy / "tokenizer.json"))
    for flags in ([], ["--rolling"], ["--context", "the capital"]):
        assert score(copy, "--text", " of France", "--json", *flags) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == ["of", "France"]
