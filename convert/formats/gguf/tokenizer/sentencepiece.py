"""SentencePiece's scores, which GGUF keeps instead of merges: from its own file, or from the merges.

SentencePiece joins the two neighbors whose union scores highest; byte-pair encoding as Hugging Face has it
applies the first merge of a list. They agree where all the merges that make a token stand together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convert.formats.gguf.tokenizer.refusal import refusal
from convert.formats.gguf.tokenizer.vocabulary import bos_eos_metadata, pad_vocabulary
from llama_jax.text.sentencepiece import (
    CONTROL,
    NORMAL,
    SPACE,
    USER_DEFINED,
    merges_from_scores,
    read_model,
)
from llama_jax.text.tokenizer import read_tokenizer

_ADDED_SCORE = -1000.0  # llama.cpp's converter gives it to tokens that SentencePiece does not know


def open_sentencepiece(files: Mapping[str, bytes]) -> Any:
    """The `SentencePieceProcessor` of tokenizer.model; None where there is no such file.

    Raises:
        ValueError: a file of another form, or sentencepiece is not installed.
    """
    if "tokenizer.model" not in files:
        return None
    try:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=files["tokenizer.model"])
    except ImportError:
        raise refusal(
            "tokenizer.model: sentencepiece is not installed; in the checkout: pip install '.[convert]'"
        ) from None
    except RuntimeError:
        raise refusal("tokenizer.model is not a SentencePiece model") from None


def scores_of_pieces(tokens: Iterable[str], pieces: Any) -> list[float]:
    """A score for each token, as tokenizer.model has them."""
    known = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.vocab_size())}
    return [known.get(token, _ADDED_SCORE) for token in tokens]


def scores_of_merges(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, str]]
) -> list[float]:
    """A score for each token, such that joining by score is merging by `merges`.

    Raises:
        ValueError: no scores do: a token's merges do not stand together, or are not all of them.
    """
    ranks = {token: -float(i) for i, token in enumerate(dict.fromkeys(map("".join, merges)))}
    scores = [
        ranks.get(token, -float(len(ranks))) if type_ == NORMAL else _ADDED_SCORE
        for token, type_ in zip(tokens, types, strict=True)
    ]
    by_score = _by_token(merges_from_scores(list(tokens), list(types), scores))
    for group, group_by_score in itertools.zip_longest(_by_token(merges), by_score):
        if group != group_by_score:
            token, _ = group or group_by_score
            raise refusal(
                f"the merges that make {token!r} cannot be expressed as SentencePiece's scores"
            )
    return scores


def _by_token(merges: Iterable[tuple[str, str]]) -> list[tuple[str, set[tuple[str, str]]]]:
    """Tokens in the order in which they are made, each with its merges."""
    return [(token, set(group)) for token, group in itertools.groupby(merges, key="".join)]


def sentencepiece_metadata(pieces: Any, files: Mapping[str, bytes], rows: int) -> dict[str, Any]:
    """The vocabulary of a tokenizer.model that has no tokenizer.json beside it.

    Args:
        pieces: the `SentencePieceProcessor` of tokenizer.model.
        rows: of the embedding; ids without a token are padding.
    """
    model = read_model(files["tokenizer.model"])
    entries = dict(enumerate(zip(model.tokens, model.types, strict=True)))
    tokenizer = read_tokenizer(files)
    for i, token in tokenizer.get_added_tokens_decoder().items():
        if i not in entries or entries[i][1] in (NORMAL, USER_DEFINED):
            entries[i] = token.content, CONTROL if token.special else USER_DEFINED
    tokens, types = pad_vocabulary(entries, rows)
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores_of_pieces(tokens, pieces),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": pieces.unk_id(),
        "tokenizer.ggml.add_space_prefix": pieces.encode("a", out_type=str)[0].startswith(SPACE),
        **bos_eos_metadata(tokenizer),
    }
