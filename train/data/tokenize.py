"""Text to token files, `python -m train tokenize`; an interrupted command continues where it stopped.

Each document is encoded by the tokenizer, with the beginning-of-text token if the tokenizer adds one, and
followed by the end-of-text token (or preceded by the beginning-of-text token if there is no end token).
Special tokens spelled out in the text are encoded as text, so that a document cannot forge a boundary.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llama_jax.files.paths import local_path, source_path
from llama_jax.text.chat_template import find_chat_template
from llama_jax.text.tokenizer import load_tokenizer
from train.data.chat import Chat, Template, assistant_tokens, render
from train.data.digests import sources_digest, tokenizer_files_digest
from train.data.documents import read_split_documents
from train.data.special_ids import SpecialIds, special_ids
from train.data.token_shards import (
    INDEX_FILE,
    VERSION,
    Index,
    filling,
    read_index,
    token_dtype,
    write_index,
    write_shard,
)
from train.data.tokenizer_copy import copy_tokenizer
from train.data.tokens import SPLITS, Split
from train.options import require_local

T = TypeVar("T")

Document = tuple[Split, str | Chat]

_REMEDY = ", so runs need --evaluation.every 0"

_CHATS = 256  # conversations that are rendered at a time
_DIGITS = 16  # of a SHA-256 in the index

# characters encoded at a time on all cores, enough to keep them busy
_BATCH = 1 << 22


def tokenize(
    sources: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    text_field: str | None = None,
    chat: bool = False,
    validation_fraction: float = 0.005,
    shard_tokens: int = 1 << 25,
    eos: str | None = None,
    report: Callable[[int, int], object] = lambda read, tokens: None,
    identified: Callable[[int], object] = lambda count: None,
    note: Callable[[str], object] = lambda line: None,
) -> Index:
    """Tokenize documents into a directory of `train.data.token_shards`.

    The hash of a document's text decides whether it belongs to the validation split, so equal documents
    are in the same split, whatever else the corpus holds. A saved `DatasetDict` of Hugging Face's datasets,
    or a data set from the Hub, keeps its own splits, if it has one for validation. Interrupted at any
    moment, the same call continues after the last complete shard and produces the same bytes; a complete
    directory is left as it is. A call is the same if the contents of its sources and tokenizer are, which
    are read to compare them.

    Args:
        sources: files, directories and globs, as `train.data.documents` reads them.
        tokenizer: a tokenizer.json or a tokenizer.model, the directory that has one, or a name on the Hub.
        out: the directory to write; it need not exist.
        text_field: field or column of the text, by default "text", or of the messages, "messages".
        chat: documents are conversations, which the tokenizer's chat template renders, and only what the
            assistant says is in the loss.
        validation_fraction: of the documents, 0 <= fraction < 1.
        shard_tokens: a shard ends with the document that reaches this many; a shard is held in memory.
        eos: the end-of-text token, overriding the files beside the tokenizer.
        report: called after each batch with the bytes read and the tokens written so far.
        identified: called with the number of bytes hashed since the last call, to identify the sources.
        note: called with a line for a split that stays empty.

    Raises:
        ValueError: sources that cannot be read, no tokenizer or one without an end-of-text token, numbers
            out of range, or a directory that holds something else or was made with other arguments.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction: found {validation_fraction}, expected 0 <= it < 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: found {shard_tokens}, expected at least 1")
    if not sources:
        raise ValueError("sources: give at least one file, directory or glob")
    require_local("out", out)
    out, tokenizer = local_path(out), source_path(tokenizer, weights=False)
    home = tokenizer.parent if tokenizer.is_file() else tokenizer
    encoder = load_tokenizer(tokenizer)
    tokenizer_json = encoder.to_str()
    encoder.no_truncation()
    encoder.no_padding()
    special = special_ids(encoder, home, eos)
    # the special tokens in a chat's text are the template's
    encoder.encode_special_tokens = not chat
    template = _chat_template(encoder, home) if chat else None
    field = text_field or ("messages" if chat else "text")
    vocab_size = 1 + max(encoder.get_vocab().values())
    existing = read_index(out) if (out / INDEX_FILE).exists() else None
    version = VERSION if existing is None else existing.version
    index = Index(
        complete=False,
        dtype=token_dtype(vocab_size),
        vocab_size=vocab_size,
        eos_id=special.eos_id,
        bos_id=special.bos_id,
        tokenizer=[],
        made_from={
            "sources": sources_digest(sources, version=version, hashed=identified),
            "tokenizer": tokenizer_files_digest(tokenizer, version=version),
            "boundary_id": special.bos_id if special.eos_id is None else special.eos_id,
            "text_field": field,
            "validation_fraction": validation_fraction,
            "shard_tokens": shard_tokens,
        },
        splits={split: [] for split in SPLITS},
        loss_mask=chat,
    )
    if template is not None:
        digest = hashlib.sha256(template.source.encode()).hexdigest()
        index.made_from["chat_template"] = digest[:_DIGITS]
    index = _begin_or_continue(out, index, existing)
    if index.complete:
        if not index.splits["validation"] and validation_fraction:
            note(f"the validation split is empty{_REMEDY}; {filling(index.fills_validation)}")
        return index
    if not index.tokenizer or not all((out / name).exists() for name in index.tokenizer):
        names = copy_tokenizer(tokenizer, tokenizer_json, special, eos, out)
        index = replace(index, tokenizer=names)
        write_index(out, index)

    shards = _ShardWriter(out, index, shard_tokens)
    bytes_read = 0

    def advance(count: int) -> None:
        nonlocal bytes_read
        bytes_read += count

    assignment = _Assignment(validation_fraction)
    documents = assignment.split(
        read_split_documents(sources, text_field=field, chat=chat, advance=advance)
    )
    for batch in _prefetched(_batches(_remaining(documents, index))):
        for split, ids, mask in _encoded(encoder, batch, special, template):
            shards.add(split, ids, mask)
        report(bytes_read, shards.tokens)
    shards.finish()
    report(bytes_read, shards.tokens)
    fills = None if index.splits["validation"] else assignment.filling_fraction("validation")
    index = replace(index, complete=True, fills_validation=fills)
    write_index(out, index)
    for split in SPLITS:
        if not index.splits[split] and (split == "train" or validation_fraction):
            remedy = _REMEDY if split == "validation" else ""
            fraction = assignment.filling_fraction(split)
            note(f"the {split} split is empty{remedy}; {filling(fraction)}")
    return index


class _ShardWriter:
    """Collects the encoded documents of both splits, and writes each shard when it is full.

    tokens: written and collected so far.
    """

    def __init__(self, directory: Path, index: Index, shard_tokens: int) -> None:
        self._directory, self._index, self._shard_tokens = directory, index, shard_tokens
        self._dtype = np.dtype(index.dtype)
        self._documents: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._masks: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._sizes = dict.fromkeys(SPLITS, 0)
        self.tokens = sum(shard.tokens for split in SPLITS for shard in index.splits[split])

    def add(self, split: Split, ids: list[int], mask: list[bool] | None = None) -> None:
        """Add a document; if it fills a shard, write that, and the index."""
        if mask is not None:
            self._masks[split].append(np.asarray(mask, np.bool_))
        self._documents[split].append(np.asarray(ids, self._dtype))
        self._sizes[split] += len(ids)
        self.tokens += len(ids)
        if self._sizes[split] >= self._shard_tokens:
            self._write(split)
            write_index(self._directory, self._index)

    def finish(self) -> None:
        """Write what is left as shards that are not full; the caller writes the index."""
        for split in SPLITS:
            if self._documents[split]:
                self._write(split)

    def _write(self, split: Split) -> None:
        written = self._index.splits[split]
        masks = self._masks[split] or None
        documents = self._documents[split]
        written.append(write_shard(self._directory, split, len(written), documents, masks))
        self._documents[split], self._masks[split], self._sizes[split] = [], [], 0


class _Assignment:
    """Assigns each document to a split by a hash of its text, a number from 0 to 1."""

    def __init__(self, validation_fraction: float) -> None:
        self._fraction = validation_fraction
        self._lowest, self._highest = math.inf, -math.inf

    def split(self, documents: Iterable[tuple[Split | None, str | Chat]]) -> Iterator[Document]:
        """Each document with its split, which those of a saved data set have already."""
        for given, text in documents:
            if given is not None:
                yield given, text
                continue
            key = text if isinstance(text, str) else text.key
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            number = int.from_bytes(digest, "big") / 2**64
            self._lowest, self._highest = min(self._lowest, number), max(self._highest, number)
            yield "validation" if number < self._fraction else "train", text

    def filling_fraction(self, split: Split) -> float | None:
        """The validation fraction that would have given an empty split a document; None if none does."""
        if self._lowest >= self._highest:
            return None
        # the shortest fraction between the numbers, so that both splits get a document
        digits = 3
        for digits in range(3, 18):
            if split == "validation":
                fraction = round(self._lowest + 10**-digits, digits)
            else:
                fraction = round(self._highest, digits)
            if self._lowest < fraction <= self._highest:
                break
        return fraction


def _begin_or_continue(out: Path, index: Index, existing: Index | None) -> Index:
    """The existing index, if it was made with the same arguments; without one, write `index`."""
    if existing is not None:
        for key, expected in index.made_from.items():
            if existing.made_from.get(key) != expected:
                raise ValueError(
                    f"{out}: was made with {key} {existing.made_from.get(key)!r}, not {expected!r}: "
                    "remove it, choose another --out, or use the same arguments"
                )
        return existing
    leftover = f".{INDEX_FILE}.partial"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a directory")
    if out.exists() and any(path.name != leftover for path in out.iterdir()):
        raise ValueError(f"{out}: is not empty and not a token directory; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_index(out, index)
    return index


def _remaining(documents: Iterable[Document], index: Index) -> Iterator[Document]:
    """The documents that are in no shard yet; those in shards were the first of their split."""
    done = {split: sum(shard.documents for shard in index.splits[split]) for split in SPLITS}
    for split, text in documents:
        if done[split]:
            done[split] -= 1
        else:
            yield split, text


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text) if isinstance(text, str) else _BATCH // _CHATS
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _prefetched(items: Iterator[list[T]]) -> Iterator[list[T]]:
    """The same items, each produced in a thread while the previous one is used."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _encoded(
    encoder: Any, batch: Sequence[Document], special: SpecialIds, template: Template | None
) -> Iterator[tuple[Split, list[int], list[bool] | None]]:
    """Each document's split and ids and, of a chat, which of them are in the loss."""
    splits = [split for split, _ in batch]
    if template is None:
        encodings = encoder.encode_batch_fast([text for _, text in batch])
        for split, encoding in zip(splits, encodings, strict=True):
            yield split, _bounded(encoding.ids, special), None
        return
    chats = list(render(template, [chat for _, chat in batch if isinstance(chat, Chat)]))
    encodings = encoder.encode_batch([chat.text for chat in chats], add_special_tokens=False)
    for split, chat, encoding in zip(splits, chats, encodings, strict=True):
        yield split, encoding.ids, assistant_tokens(chat, encoding)


def _chat_template(encoder: Any, home: Path) -> Template:
    """Raises ValueError if there is none."""
    source, names = find_chat_template(home)
    unsplit = [token.content for token in encoder.get_added_tokens_decoder().values()]
    return Template(source, names, frozenset(unsplit))


def _bounded(ids: list[int], special: SpecialIds) -> list[int]:
    if special.eos_id is not None:
        return ids if ids[-1:] == [special.eos_id] else [*ids, special.eos_id]
    assert special.bos_id is not None
    return ids if ids[:1] == [special.bos_id] else [special.bos_id, *ids]
