"""Text to token files: `python -m train tokenize`. What it has written it does not do again.

Each document is encoded as the tokenizer does it by itself, with the beginning token of those that add
one, and ended with the end-of-text token (begun with the beginning token, where there is no other).
Special tokens spelled out in the text are text: no document can forge the end of another.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from llama_jax.tokenizer import load_tokenizer
from train.documents import read_documents, source_files
from train.token_shards import (
    INDEX_FILE,
    SPLITS,
    Index,
    Split,
    read_index,
    token_dtype,
    write_index,
    write_shard,
)

T = TypeVar("T")

# what a tokenizer consists of besides tokenizer.json, where it has them
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_COMMON_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_COMMON_BOS = ("<s>", "<|begin_of_text|>", "<bos>")

# characters that are encoded at once, on all cores: enough to keep them busy
_BATCH = 1 << 22


def tokenize(
    sources: Sequence[str | Path],
    tokenizer: str | Path,
    out: str | Path,
    *,
    text_field: str = "text",
    validation_fraction: float = 0.005,
    shard_tokens: int = 1 << 25,
    eos: str | None = None,
    report: Callable[[int, int], object] = lambda read, tokens: None,
) -> Index:
    """Tokenize documents into a directory of `train.token_shards`.

    A document belongs to the validation split by the hash of its text: equal documents are on one side, in
    any order of any corpus. Interrupted at any moment, the same call goes on after the last complete shard
    and ends with the same bytes; a complete directory is left as it is.

    Args:
        sources: files, directories and globs, as `train.documents` reads them.
        tokenizer: a tokenizer.json or the directory that has one.
        out: the directory to write; it need not exist.
        validation_fraction: of the documents, 0 <= fraction < 1.
        shard_tokens: a shard ends with the document that reaches this many; a shard is held in memory.
        eos: the end-of-text token, where not what is said by the files beside the tokenizer.
        report: called after each batch with the bytes read so far, and with the tokens there are so far.

    Raises:
        ValueError: sources that cannot be read, no tokenizer or one without an end-of-text token, numbers
            out of range, or a directory that holds something else or was begun with other arguments.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction: found {validation_fraction}, expected 0 <= it < 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: found {shard_tokens}, expected at least 1")
    out, tokenizer_file = Path(out), _tokenizer_file(tokenizer)
    encoder = load_tokenizer(tokenizer_file)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    eos_id, bos_id = _boundary(encoder, tokenizer_file.parent, eos)
    vocab_size = 1 + max(encoder.get_vocab().values())
    index = Index(
        complete=False,
        dtype=token_dtype(vocab_size),
        vocab_size=vocab_size,
        eos_id=eos_id,
        bos_id=bos_id,
        tokenizer=[
            "tokenizer.json",
            *(n for n in _BESIDE if (tokenizer_file.parent / n).is_file()),
        ],
        made_from={
            "sources": _digest_of_names(sources),
            "tokenizer": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()[:16],
            "boundary_id": bos_id if eos_id is None else eos_id,
            "text_field": text_field,
            "validation_fraction": validation_fraction,
            "shard_tokens": shard_tokens,
        },
        splits={split: [] for split in SPLITS},
    )
    index = _begin(out, index)
    if index.complete:
        return index
    for name in index.tokenizer:
        beside = tokenizer_file if name == "tokenizer.json" else tokenizer_file.parent / name
        _copy(beside, out / name)

    dtype = np.dtype(index.dtype)
    pending: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    read, tokens = 0, sum(shard.tokens for split in SPLITS for shard in index.splits[split])

    def advance(count: int) -> None:
        nonlocal read
        read += count

    def finish_shard(split: Split) -> None:
        shards = index.splits[split]
        shards.append(write_shard(out, split, len(shards), pending[split]))
        pending[split], sizes[split] = [], 0

    documents = read_documents(sources, text_field=text_field, advance=advance)
    todo = _not_done(_assign(documents, validation_fraction), index)
    for batch in _ahead(_batches(todo)):
        encodings = encoder.encode_batch_fast([text for _, text in batch])
        for (split, _), encoding in zip(batch, encodings, strict=True):
            ids = _bounded(encoding.ids, eos_id, bos_id)
            pending[split].append(np.asarray(ids, dtype))
            sizes[split] += len(ids)
            tokens += len(ids)
            if sizes[split] >= shard_tokens:
                finish_shard(split)
                write_index(out, index)
        report(read, tokens)
    for split in SPLITS:
        if pending[split]:
            finish_shard(split)
    report(read, tokens)
    index = replace(index, complete=True)
    write_index(out, index)
    return index


def _begin(out: Path, index: Index) -> Index:
    """The index that is there already, if it is of the same arguments, else `index`, written."""
    first = f"{INDEX_FILE}.partial"
    if (out / INDEX_FILE).exists():
        known = read_index(out)
        for key, expected in index.made_from.items():
            if known.made_from.get(key) != expected:
                raise ValueError(
                    f"{out}: found a directory made with {key} {known.made_from.get(key)!r}, expected "
                    f"{expected!r}: remove it, choose another --out, or go on with the same arguments"
                )
        return known
    if out.exists() and (not out.is_dir() or any(path.name != first for path in out.iterdir())):
        raise ValueError(f"{out}: found something else, expected it absent or an empty directory")
    out.mkdir(parents=True, exist_ok=True)
    write_index(out, index)
    return index


def _assign(documents: Iterable[str], fraction: float) -> Iterator[tuple[Split, str]]:
    """Each document with its split."""
    for text in documents:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        yield "validation" if share < fraction else "train", text


def _not_done(documents: Iterable[tuple[Split, str]], index: Index) -> Iterator[tuple[Split, str]]:
    """The documents that are in no shard yet: those that are were the first of their split."""
    done = {split: sum(shard.documents for shard in index.splits[split]) for split in SPLITS}
    for split, text in documents:
        if done[split]:
            done[split] -= 1
        else:
            yield split, text


def _batches(documents: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    batch, size = [], 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ahead(items: Iterator[list[T]]) -> Iterator[list[T]]:
    """The same items, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _bounded(ids: list[int], eos_id: int | None, bos_id: int | None) -> list[int]:
    if eos_id is not None:
        return ids if ids[-1:] == [eos_id] else [*ids, eos_id]
    assert bos_id is not None
    return ids if ids[:1] == [bos_id] else [bos_id, *ids]


def _boundary(encoder: Tokenizer, beside: Path, eos: str | None) -> tuple[int | None, int | None]:
    """(eos_id, None), or (None, bos_id) for a tokenizer that has no end-of-text token."""
    if eos is not None:
        if encoder.token_to_id(eos) is None:
            raise ValueError(f"--eos: found {eos!r}, expected a token of the tokenizer")
        return encoder.token_to_id(eos), None
    for name, common in (("eos", _COMMON_EOS), ("bos", _COMMON_BOS)):
        said = [_said(beside, f"{name}_token"), _said(beside, f"{name}_token_id"), *common]
        for token in said:
            if isinstance(token, str) and (found := encoder.token_to_id(token)) is not None:
                return (found, None) if name == "eos" else (None, found)
            if isinstance(token, int) and encoder.id_to_token(token) is not None:
                return (token, None) if name == "eos" else (None, token)
    raise ValueError(
        f"{beside}: found no end-of-text token beside the tokenizer nor a common one in it, expected --eos"
    )


def _said(directory: Path, key: str) -> Any:
    """A special token (text) or its id as the files beside a tokenizer have it; the first of several."""
    names = ("tokenizer_config.json", "special_tokens_map.json")
    if key.endswith("_id"):
        names = ("generation_config.json", "config.json")
    for name in names:
        path = directory / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_bytes()).get(key)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: found no JSON ({error}), expected an object") from None
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None:
            return value
    return None


def _tokenizer_file(tokenizer: str | Path) -> Path:
    path = Path(tokenizer)
    path = path if path.is_file() else path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: found no such file, expected a tokenizer")
    return path


def _digest_of_names(sources: Sequence[str | Path]) -> str:
    """Names and sizes of the files in order: where they lie does not matter."""
    if not sources:
        raise ValueError("sources: found none, expected files, directories or globs")
    files = [file for source in sources for file in source_files(source)]
    names = "".join(f"{file.name}\0{file.stat().st_size}\0" for file in files)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]


def _copy(source: Path, destination: Path) -> None:
    partial = destination.with_name(f"{destination.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, destination)
