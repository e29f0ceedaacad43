"""SentencePiece's scores, which GGUF keeps instead of merges: from its own file, or from the merges.

SentencePiece joins the two neighbours whose union scores highest; byte-pair encoding as Hugging Face has it
applies the first merge of a list. They agree where all the merges that make a token stand together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convert.formats.gguf.special_tokens import refusal
from llama_jax.text.sentencepiece import (
    CONTROL,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    merges_from_scores,
    read_model,
)
from llama_jax.text.tokenizer import read_tokenizer

_ADDED_SCORE = -1000.0  # llama.cpp's converter gives it to tokens that SentencePiece does not know


def open_sentencepiece(files: Mapping[str, bytes]) -> Any:
    """The `SentencePieceProcessor` of tokenizer.model; None where there is no such file."""
    if "tokenizer.model" not in files:
        return None
    try:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=files["tokenizer.model"])
    except ImportError:
        raise refusal("tokenizer.model needs the package sentencepiece, found none") from None
    except RuntimeError:
        raise refusal("tokenizer.model is not SentencePiece's, expected that form") from None


def scores_of_pieces(tokens: Iterable[str], pieces: Any) -> list[float]:
    """A score for each token, as tokenizer.model has them."""
    known = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.vocab_size())}
    return [known.get(token, _ADDED_SCORE) for token in tokens]


def scores_of_merges(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, str]]
) -> list[float]:
    """A score for each token, such that joining by score is merging by `merges`.

    Raises ValueError where no scores do: a token's merges do not stand together, or are not all of them.
    """
    ranks = {token: -float(i) for i, token in enumerate(dict.fromkeys(map("".join, merges)))}
    scores = [
        ranks.get(token, -float(len(ranks))) if type_ == NORMAL else _ADDED_SCORE
        for token, type_ in zip(tokens, types, strict=True)
    ]
    expected = _by_token(merges_from_scores(list(tokens), list(types), scores))
    for found, wanted in itertools.zip_longest(_by_token(merges), expected):
        if found != wanted:
            token = (found or wanted)[0]
            raise refusal(
                f"the merges that make {token!r} follow no scores, expected SentencePiece's"
            )
    return scores


def _by_token(merges: Iterable[tuple[str, str]]) -> list[tuple[str, set[tuple[str, str]]]]:
    """Tokens in the order in which they are made, each with its merges."""
    return [(token, set(group)) for token, group in itertools.groupby(merges, key="".join)]


def sentencepiece_metadata(pieces: Any, files: Mapping[str, bytes], rows: int) -> dict[str, Any]:
    """The vocabulary of a tokenizer.model that has no tokenizer.json beside it.

    Args:
        rows: of the embedding; ids without a token are padding.
    """
    model = read_model(files["tokenizer.model"])
    vocabulary = dict(enumerate(zip(model.tokens, model.types, strict=True)))
    tokenizer = read_tokenizer(files)
    for i, token in tokenizer.get_added_tokens_decoder().items():
        kind = CONTROL if token.special else USER_DEFINED
        if vocabulary.get(i, ("", NORMAL))[1] in (NORMAL, USER_DEFINED):
            vocabulary[i] = token.content, kind
    if max(vocabulary) >= rows:
        raise refusal(f"it has ids up to {max(vocabulary)}, expected less than vocab_size {rows}")
    entries = [vocabulary.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
    tokens = [token for token, _ in entries]
    around = tokenizer.encode("a").special_tokens_mask
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores_of_pieces(tokens, pieces),
        "tokenizer.ggml.token_type": [kind for _, kind in entries],
        "tokenizer.ggml.unknown_token_id": pieces.unk_id(),
        "tokenizer.ggml.add_space_prefix": pieces.encode("a", out_type=str)[0].startswith(SPACE),
        "tokenizer.ggml.add_bos_token": around[0] == 1,
        "tokenizer.ggml.add_eos_token": around[-1] == 1,
    }
