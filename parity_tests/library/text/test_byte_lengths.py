"""Bytes of tokens: of every text, those of its tokens add up to its own."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llama_jax.text.byte_lengths import byte_lengths

TEXTS = ["Hello, world", " a  b\n", "Grüße 🙂 日本語", "", "x<pad>y", "<s>"]


def train(tokenizer: Tokenizer, **options: object) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], show_progress=False, **options
    )
    tokenizer.train_from_iterator(["Hello world, Grüße an die Welt"] * 4, trainer)
    tokenizer.add_tokens(["<pad>"])  # not special: text as any other
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def byte_fallback() -> Tokenizer:
    """As the tokenizers of Llama 2 and Mistral, without the space before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    train(tokenizer)
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab) + 300
    tokenizer.model = models.BPE(vocab, [], byte_fallback=True, fuse_unk=True)
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_they_add_up_to_the_text(make) -> None:
    tokenizer = make()
    lengths = byte_lengths(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert sum(lengths[ids]) == (0 if text == "<s>" else len(text.encode())), text


def test_words_that_decoding_separates() -> None:
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "zwölf": 3}, unk_token="one"))
    assert byte_lengths(tokenizer).tolist() == [4, 0, 0, 7]
