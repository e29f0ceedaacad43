"""Text to token files: `python -m train tokenize`. What it has written it does not do again.

Each document is encoded as the tokenizer does it by itself, with the beginning token of those that add
one, and ended with the end-of-text token (begun with the beginning token, where there is no other).
Special tokens spelled out in the text are text: no document can forge the end of another.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from llama_jax.files.json_object import read_json_object
from llama_jax.files.staging import write_text
from llama_jax.text.companions import companion_files, copy_companions, copy_file
from llama_jax.text.tokenizer import load_tokenizer
from train.data.documents import read_documents, source_files
from train.data.special_ids import SpecialIds, model_ids, special_ids
from train.data.token_shards import (
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

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
# what besides tokenizer.json or tokenizer.model changes which ids a text has
_ALSO_TOKENIZER = ("added_tokens.json", _MAP, _CONFIG)

_DIGITS = 16  # of a SHA-256 in the index

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
    identified: Callable[[int], object] = lambda count: None,
    note: Callable[[str], object] = lambda line: None,
) -> Index:
    """Tokenize documents into a directory of `train.data.token_shards`.

    A document belongs to the validation split by the hash of its text: equal documents are on one side, in
    any order of any corpus. Interrupted at any moment, the same call goes on after the last complete shard
    and ends with the same bytes; a complete directory is left as it is. The same call is one with sources
    and a tokenizer of the same contents, which are read to know it.

    Args:
        sources: files, directories and globs, as `train.data.documents` reads them.
        tokenizer: a tokenizer.json or a tokenizer.model, or the directory that has one.
        out: the directory to write; it need not exist.
        validation_fraction: of the documents, 0 <= fraction < 1.
        shard_tokens: a shard ends with the document that reaches this many; a shard is held in memory.
        eos: the end-of-text token, where not what is said by the files beside the tokenizer.
        report: called after each batch with the bytes read so far, and with the tokens there are so far.
        identified: called with how many more bytes of the sources have been read to identify them.
        note: called with a line about a split that stays empty.

    Raises:
        ValueError: sources that cannot be read, no tokenizer or one without an end-of-text token, numbers
            out of range, or a directory that holds something else or was begun with other arguments.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction: found {validation_fraction}, expected 0 <= it < 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: found {shard_tokens}, expected at least 1")
    if not sources:
        raise ValueError("sources: found none, expected files, directories or globs")
    out, tokenizer = Path(out), Path(tokenizer)
    home = tokenizer.parent if tokenizer.is_file() else tokenizer
    encoder = load_tokenizer(tokenizer)
    plain = encoder.to_str()
    encoder.no_truncation()
    encoder.no_padding()
    special = special_ids(encoder, home, eos)
    encoder.encode_special_tokens = True
    vocab_size = 1 + max(encoder.get_vocab().values())
    known = read_index(out) if (out / INDEX_FILE).exists() else None
    names_only = known is not None and known.version == 1
    index = Index(
        complete=False,
        dtype=token_dtype(vocab_size),
        vocab_size=vocab_size,
        eos_id=special.eos_id,
        bos_id=special.bos_id,
        tokenizer=[],
        made_from={
            "sources": _digest_of_names(sources)
            if names_only
            else _digest_of_contents(sources, identified),
            "tokenizer": _digest_of_tokenizer(tokenizer, names_only),
            "boundary_id": special.bos_id if special.eos_id is None else special.eos_id,
            "text_field": text_field,
            "validation_fraction": validation_fraction,
            "shard_tokens": shard_tokens,
        },
        splits={split: [] for split in SPLITS},
    )
    index = _begin(out, index, known)
    if index.complete:
        return index
    if not index.tokenizer or not all((out / name).exists() for name in index.tokenizer):
        index = replace(index, tokenizer=_keep_tokenizer(tokenizer, plain, special, eos, out))
        write_index(out, index)

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
    lowest, highest = math.inf, -math.inf

    def assigned() -> Iterator[tuple[Split, str]]:
        nonlocal lowest, highest
        for text in documents:
            share = _share(text)
            lowest, highest = min(lowest, share), max(highest, share)
            yield "validation" if share < validation_fraction else "train", text

    todo = _not_done(assigned(), index)
    for batch in _ahead(_batches(todo)):
        encodings = encoder.encode_batch_fast([text for _, text in batch])
        for (split, _), encoding in zip(batch, encodings, strict=True):
            ids = _bounded(encoding.ids, special)
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
    for split in SPLITS:
        if not index.splits[split] and (split == "train" or validation_fraction):
            note(_about_empty(split, lowest, highest))
    return index


def _begin(out: Path, index: Index, known: Index | None) -> Index:
    """The index that is there already, if it is of the same arguments, else `index`, written."""
    first = f"{INDEX_FILE}.partial"
    if known is not None:
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


def _share(text: str) -> float:
    """Where a document lies between 0 and 1: below the fraction it is for validation."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _about_empty(split: Split, lowest: float, highest: float) -> str:
    """What would fill the split. The documents' shares are from `lowest` to `highest`."""
    found = f"{split}: found no document, expected at least one"
    if split == "validation":
        found += ", or `python -m train run --evaluation.every 0`, which needs none"
    if lowest == highest:
        return f"{found}; one document cannot be divided: tokenize more of them"
    # the shortest number between: one document, and not all, is below it
    digits = 3
    for digits in range(3, 18):
        fraction = round(lowest + 10**-digits if split == "validation" else highest, digits)
        if lowest < fraction <= highest:
            break
    return f"{found}; --validation-fraction {fraction:.{digits}g} would do"


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


def _bounded(ids: list[int], special: SpecialIds) -> list[int]:
    if special.eos_id is not None:
        return ids if ids[-1:] == [special.eos_id] else [*ids, special.eos_id]
    assert special.bos_id is not None
    return ids if ids[:1] == [special.bos_id] else [special.bos_id, *ids]


def _keep_tokenizer(
    tokenizer: Path, plain: str, special: SpecialIds, eos: str | None, out: Path
) -> list[str]:
    """Copy the tokenizer's files, and make those that other programs need; returns the names.

    Args:
        plain: the tokenizer as JSON.
        eos: the end-of-text token, where the user has named it.
    """
    home = tokenizer.parent if tokenizer.is_file() else tokenizer
    names = copy_companions(home, out, generation=False)
    if tokenizer.suffix == ".model" or not ("tokenizer.json" in names or tokenizer.is_file()):
        write_text(out / "tokenizer.json", plain)
    elif tokenizer.is_file():
        copy_file(tokenizer, out / "tokenizer.json")
    if not (out / _CONFIG).exists():
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        _write_json(out / _CONFIG, config | _named_tokens(out, plain, special))
    for name in (_CONFIG, _MAP) if eos is not None else ():
        if (out / name).exists():
            _write_json(out / name, read_json_object(out / name) | {"eos_token": eos})
    return list(companion_files(out, generation=False))


def _named_tokens(out: Path, plain: str, special: SpecialIds) -> dict[str, Any]:
    """The special tokens of a tokenizer_config.json that nobody has written."""
    path = out / _MAP
    named = read_json_object(path) if path.exists() else {}
    encoder = Tokenizer.from_str(plain)
    for name, token in model_ids(special).items():
        assert token is not None
        named[name.removesuffix("_id")] = encoder.id_to_token(token)
    return named


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    write_text(partial, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def _digest_of_tokenizer(tokenizer: Path, tokenizer_only: bool) -> str:
    """Of what decides which ids a text has; of tokenizer.json alone in an index of version 1."""
    home = tokenizer.parent if tokenizer.is_file() else tokenizer
    others = () if tokenizer_only else ("tokenizer.model", "vocab.json", "merges.txt")
    main = ("tokenizer.json", *others)
    files = [tokenizer] if tokenizer.is_file() else [home / name for name in main]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(path.read_bytes())
    if tokenizer_only:
        return digest.hexdigest()[:_DIGITS]
    for name in _ALSO_TOKENIZER:
        if (home / name).is_file():
            fields = read_json_object(home / name)
            fields.pop("chat_template", None)
            digest.update(f"{name}\0{json.dumps(fields, sort_keys=True)}\0".encode())
    return digest.hexdigest()[:_DIGITS]


def _digest_of_contents(sources: Sequence[str | Path], identified: Callable[[int], object]) -> str:
    """Names and contents of the files in order: where they lie does not matter."""
    digest = hashlib.sha256()
    for file in (file for source in sources for file in source_files(source)):
        digest.update(f"{file.name}\0".encode(errors="surrogateescape"))
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                content.update(block)
                identified(len(block))
        digest.update(content.digest())
    return digest.hexdigest()[:_DIGITS]


def _digest_of_names(sources: Sequence[str | Path]) -> str:
    """Names and sizes of the files in order, by which version 1 of the index knew them."""
    files = [file for source in sources for file in source_files(source)]
    names = "".join(f"{file.name}\0{file.stat().st_size}\0" for file in files)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:_DIGITS]
