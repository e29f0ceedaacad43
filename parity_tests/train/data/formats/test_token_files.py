"""Token files of Megatron, llm.c and nanoGPT: windows as of a token directory with the same documents."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.train.corpus import documents_of, token_directory, word_tokenizer
from parity_tests.train.data.formats.opened import error_of, opened
from parity_tests.train.data.formats.writers import Documents, bare, flat, llm_c, megatron
from train.data.formats.source import token_files
from train.data.token_directory import TokenDirectory
from train.data.tokens import Source, document_ends, read_tokens
from train.data.windows import windows
from train.options import TokenOptions

EOS, BOS, FIRST, VOCAB = 1, 0, 3, 300
WORDS = ["<s>", "<|endoftext|>", "<unk>", *(f"w{n}" for n in range(VOCAB - FIRST))]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    return word_tokenizer(directory, WORDS, bos_token="<s>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def large_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More ids than uint16 has."""
    words = [*WORDS, *(f"x{n}" for n in range(70_000 - VOCAB))]
    directory = tmp_path_factory.mktemp("large")
    return word_tokenizer(directory, words, bos_token="<s>", eos_token="<|endoftext|>")


def all_windows(source: Source, length: int) -> list[dict[str, list[int]]]:
    dataset = windows([source], split="train", sequence_length=length, vocab_size=VOCAB, seed=3)
    return [{name: a.tolist() for name, a in dataset[n].items()} for n in range(8)]


BODIES = st.lists(
    st.lists(st.integers(FIRST, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=8
)


@settings(max_examples=12, deadline=None)
@given(bodies=BODIES, length=st.integers(1, 12), data=st.data())
def test_windows_are_those_of_a_token_directory(
    bodies: Documents,
    length: int,
    data: st.DataObject,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Documents are divided among files anyhow; those of .bin files may go on in the next one."""
    directory = tmp_path_factory.mktemp("files")
    cut = data.draw(st.integers(0, len(bodies)))
    ended, begun = ([[*body, EOS] for body in bodies], [[BOS, *body] for body in bodies])
    parts = [ended[:cut], ended[cut:]]
    (directory / "megatron").mkdir()
    for number, part in enumerate(part for part in parts if part):
        sequences = data.draw(st.integers(1, 3))
        dtype = data.draw(st.sampled_from(["uint16", "int16", "int32", "int64"]))
        megatron(
            directory / "megatron" / f"{number}_document",
            part,
            dtype,
            sequences,
            data.draw(st.booleans()),
        )
    for name, documents, write in (("bare", ended, bare), ("llm.c", begun, llm_c)):
        (directory / name).mkdir()
        ids = flat(documents)
        place = data.draw(st.integers(1, len(ids)))
        for number, part in enumerate((ids[:place], ids[place:])):
            if part:
                write(directory / name / f"{number:06}.bin", part)
    for name, documents in (("megatron", ended), ("bare", ended), ("llm.c", begun)):
        expected = TokenDirectory(
            token_directory(directory / f"{name}-expected", [documents], vocab_size=VOCAB)
        )
        source = opened(directory / name, tokenizer)
        assert all_windows(source, length) == all_windows(expected, length)
        tokens = source.open("train")
        assert read_tokens(tokens, 0, len(tokens), VOCAB).tolist() == flat(documents)
        start = data.draw(st.integers(0, len(tokens) - 1))
        stop = data.draw(st.integers(start + 1, len(tokens)))
        ends = np.cumsum([len(document) for document in documents])
        between = ends[(ends > start) & (ends <= stop)]
        assert document_ends(tokens, start, stop).tolist() == between.tolist()


def test_the_boundary_can_be_named(tokenizer: Path, tmp_path: Path) -> None:
    documents = [[BOS, 5, EOS], [BOS, 6, 7, EOS]]
    path = bare(tmp_path / "a.bin", flat(documents))
    assert documents_of(opened(path, tokenizer).open("train")) == documents
    assert documents_of(opened(path, tokenizer, boundary="bos").open("train")) == documents
    path = llm_c(tmp_path / "b.bin", [5, EOS, 6, EOS])
    assert documents_of(opened(path, tokenizer, boundary="eos").open("train")) == [
        [5, EOS],
        [6, EOS],
    ]


def test_one_token_that_both_begins_and_ends(tmp_path: Path) -> None:
    """GPT-2's tokenizer has a single one, which llm.c puts before a document and nanoGPT after it."""
    tokenizer = word_tokenizer(tmp_path / "t", ["<unk>", "<|endoftext|>", "a", "b"])
    first = opened(llm_c(tmp_path / "c.bin", [1, 2, 1, 3, 3]), tokenizer)
    last = opened(bare(tmp_path / "n.bin", [2, 1, 3, 3, 1]), tokenizer)
    assert documents_of(first.open("train")) == [[1, 2], [1, 3, 3]]
    assert documents_of(last.open("train")) == [[2, 1], [3, 3, 1]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int32", "int64"])
def test_dtypes_of_bare_files(dtype: Any, tokenizer: Path, tmp_path: Path) -> None:
    documents = [[*range(3, 40), EOS], [5, EOS]]
    path = bare(tmp_path / "a.bin", flat(documents), dtype)
    assert documents_of(opened(path, tokenizer, dtype=dtype).open("train")) == documents


def test_llama_3_of_llm_c_and_large_vocabularies(large_tokenizer: Path, tmp_path: Path) -> None:
    documents = [[BOS, 69_999], [BOS, 5, 65_536]]
    path = llm_c(tmp_path / "a.bin", flat(documents), "llama-3")
    assert documents_of(opened(path, large_tokenizer).open("train")) == documents
    path = bare(tmp_path / "b.bin", [69_999, EOS], "uint32")
    assert documents_of(opened(path, large_tokenizer).open("train")) == [[69_999, EOS]]


def test_which_files_are_taken(tokenizer: Path, tmp_path: Path) -> None:
    for name, token in (("train_000001", 3), ("train_000002", 4), ("val_000000", 5), ("test_1", 6)):
        llm_c(tmp_path / f"fineweb_{name}.bin", [BOS, token])
    (tmp_path / ".hidden.bin").write_bytes(b"\0")
    for path in (tmp_path, tmp_path / "*.bin", tmp_path / "fineweb_*"):
        source = opened(path, tokenizer)
        assert documents_of(source.open("train")) == [[BOS, 3], [BOS, 4]]
        assert documents_of(source.open("validation")) == [[BOS, 5]]
    alone = opened(tmp_path / "fineweb_val_000000.bin", tokenizer)
    assert documents_of(alone.open("train")) == [[BOS, 5]]
    assert token_files(tmp_path / "none", 1.0, TokenOptions(), tokenizer) is None


def test_paths_of_megatron(tokenizer: Path, tmp_path: Path) -> None:
    documents = [[3, EOS], [4, 5, EOS]]
    prefix = megatron(tmp_path / "my.corpus_text_document", documents)
    for path in (prefix, Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), tmp_path, tmp_path / "my*"):
        assert documents_of(opened(path, tokenizer).open("train")) == documents
    nested = tmp_path / "split"
    for split, token in (("train", 7), ("valid", 8)):
        (nested / split).mkdir(parents=True)
        megatron(nested / split / "text_document", [[token, EOS]])
    source = opened(nested, tokenizer)
    assert documents_of(source.open("train")) == [[7, EOS]]
    assert documents_of(source.open("validation")) == [[8, EOS]]


@pytest.mark.parametrize("write", ["megatron", "bare", "llm.c"])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.95, 0.9999])
def test_held_out_documents_are_the_last(
    write: str, fraction: float, tokenizer: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    bodies = [rng.integers(FIRST, VOCAB, rng.integers(1, 30)).tolist() for _ in range(200)]
    documents = [[BOS, *body] if write == "llm.c" else [*body, EOS] for body in bodies]
    if write == "megatron":
        path = megatron(tmp_path / "a", documents)
    else:
        path = {"bare": bare, "llm.c": llm_c}[write](tmp_path / "a.bin", flat(documents))
    source = opened(path, tokenizer, validation_fraction=fraction)
    train, validation = (source.open(split) for split in ("train", "validation"))
    assert documents_of(train) + documents_of(validation) == documents
    longest = max(map(len, documents))
    total = len(train) + len(validation)
    assert abs(len(validation) - fraction * total) <= longest
    assert len(train) > 0 < len(validation)
    dataset = windows([source], split="validation", sequence_length=8, vocab_size=VOCAB, seed=0)
    assert dataset[0]["input_ids"][:4].tolist() == flat(documents_of(validation))[:4]


def test_a_single_document_is_not_divided(tokenizer: Path, tmp_path: Path) -> None:
    path = bare(tmp_path / "a.bin", [*range(3, 30), EOS])
    source = opened(path, tokenizer, validation_fraction=0.5)
    assert error_of(lambda: source.open("train")) == (
        f"{path}: is a single document, which cannot be divided for validation: run with "
        "--evaluation.every 0 and --tokens.validation-fraction 0"
    )
    plain = opened(path, tokenizer)
    assert error_of(lambda: plain.open("validation")) == error_of(plain.require_validation)
    assert error_of(plain.require_validation) == (
        f"{path}: has no files for validation: hold documents out with --tokens.validation-fraction, or "
        "run with --evaluation.every 0"
    )


def test_no_boundary_in_the_file_is_a_warning(tokenizer: Path, tmp_path: Path) -> None:
    path = bare(tmp_path / "a.bin", [3, 4, 5, 6])
    with pytest.warns(UserWarning, match=r"a.bin: its first 3 tokens lack id 1, which separates"):
        opened(path, tokenizer).require_intact(["train"], 1 << 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(path, tokenizer, boundary="eos")
        megatron(tmp_path / "b", [[3, 4, 5]])
        assert opened(tmp_path / "b", tokenizer).require_intact(["train"], 100) == 100 - 6


def test_an_id_out_of_range_names_the_dtype_option(tokenizer: Path, tmp_path: Path) -> None:
    wide = bare(tmp_path / "wide.bin", [*range(3, 40), EOS], "uint32")
    assert error_of(lambda: opened(wide, tokenizer).open("train")) == (
        f"{wide}: every other uint16 is 0, so the ids are wider: name their dtype with --tokens.dtype"
    )
    narrow = bare(tmp_path / "narrow.bin", [3, 4, 5, EOS], "uint16")
    source = opened(narrow, tokenizer, dtype="uint32")
    assert error_of(lambda: source.require_intact(["train"], 1 << 20)) == (
        f"{narrow}, token 0: found id {3 + (4 << 16)}, expected less than the tokenizer's vocabulary of "
        f"{VOCAB}; if its ids are not uint32, name their dtype with --tokens.dtype"
    )
    negative = bare(tmp_path / "negative.bin", [3, EOS, -1], "int32")
    source = opened(negative, tokenizer, dtype="int32")
    assert error_of(lambda: source.require_intact(["train"], 1 << 20)) == (
        f"{negative}, token 2: found id -1, expected at least 0; if its ids are not int32, name their "
        "dtype with --tokens.dtype"
    )
    # of files that name their dtype, it is the tokenizer that is wrong
    megatron(tmp_path / "m", [[3, 4], [5, 900]])
    source = opened(tmp_path / "m", tokenizer)
    assert error_of(lambda: source.require_intact(["train"], 1 << 20)) == (
        f"{tmp_path}/m.bin, token 3: found id 900, expected less than the tokenizer's vocabulary of {VOCAB}"
    )
    assert source.require_intact(["train"], 6) == 0  # no more is read than asked for


def test_bin_files_of_other_kinds(tokenizer: Path, tmp_path: Path) -> None:
    """Their headers could be read as ids."""
    path = tmp_path / "a.bin"
    for save, kind in (
        (lambda file: np.save(file, np.arange(3, 99, dtype=np.uint16)), "a NumPy file"),
        (lambda file: np.savez(file, np.arange(9)), "a zip archive, such as PyTorch's"),
    ):
        with path.open("wb") as file:
            save(file)
        assert error_of(lambda: opened(path, tokenizer).open("train")) == (
            f"{path}: found {kind}, expected bare ids, as `array.tofile` writes them"
        )


def test_truncated_and_unknown_bin_files(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def message() -> str:
        return error_of(lambda: opened(path, tokenizer).open("train"))

    path.write_bytes(b"\1\0\2")
    assert message() == (
        f"{path}: found 3 bytes, expected a multiple of 2 for uint16: truncated, or of another "
        "--tokens.dtype"
    )
    path.write_bytes(b"")
    assert message().startswith(f"{path}: found 0 bytes, expected a multiple of 2")
    intact = llm_c(path, [BOS, 5, 6]).read_bytes()
    for content in (intact[:-1], intact[:-2], intact + b"\0\0"):
        path.write_bytes(content)
        assert message() == (
            f"{path}: found {len(content)} bytes, expected 1030, of 3 uint16 after a header of 1024 bytes: "
            "truncated, or no token file"
        )
    path.write_bytes(intact[:500])
    assert message() == (
        f"{path}: found 500 bytes, expected a header and ids: truncated, or no token file"
    )
    llm_c(path, [BOS], version=2)
    assert message() == f"{path}: found version 2 of llm.c's format 20240520, expected 1"
    llm_c(path, [BOS], "llama-3", version=1)
    assert message() == f"{path}: found version 1 of llm.c's format 20240801, expected 7"
    llm_c(path, [BOS], magic=20240522)
    assert message() == (
        f"{path}: holds multiple-choice questions for llm.c, expected its token files"
    )


def test_damaged_indexes_of_megatron(tokenizer: Path, tmp_path: Path) -> None:
    prefix = megatron(tmp_path / "a", [[3, 4], [5]])
    index, ids = tmp_path / "a.idx", tmp_path / "a.bin"
    intact, content = index.read_bytes(), ids.read_bytes()

    def message(changed: bytes) -> str:
        index.write_bytes(changed)
        return error_of(lambda: opened(prefix, tokenizer).open("train"))

    def with_bytes(place: int, new: bytes) -> bytes:
        return intact[:place] + new + intact[place + len(new) :]

    assert message(b"TNTIDX\0\0" + intact[8:]).startswith(
        f"{index}: found TNTIDX, the format before"
    )
    assert message(b"\0" * 80) == f"{index}: not an index of Megatron, which begins with MMIDIDX"
    assert message(intact[:20]) == f"{index}: found 20 bytes, expected a header of 34: truncated"
    assert message(with_bytes(9, b"\2")) == f"{index}: found version 2, expected 1"
    assert message(with_bytes(17, b"\7")).startswith(
        f"{index}: found dtype code 7, expected that of integers: 1 (uint8), "
    )
    assert message(intact[:-8]) == (
        f"{index}: found 74 bytes, expected 82 for 2 sequences and 3 boundaries of documents"
    )
    assert message(with_bytes(74, b"\5")).startswith(f"{index}: boundaries of documents are not in")
    assert message(with_bytes(34, b"\1")).startswith(f"{index}: the sequences do not follow")
    ids.write_bytes(content[:-1])
    assert message(intact) == f"{ids}: found 5 bytes, expected 6 by a.idx"
    ids.unlink()
    assert message(intact) == f"{ids}: no such file, but there is {index}"


def test_the_tokenizer_must_be_known(tmp_path: Path) -> None:
    source = token_files(bare(tmp_path / "a.bin", [3]), 1.0, TokenOptions(), None)
    assert source is not None
    assert error_of(source.vocabulary) == (
        f"{tmp_path}/a.bin: token files have no tokenizer with them: name theirs with --tokens.tokenizer"
    )


def test_digests(tokenizer: Path, large_tokenizer: Path, tmp_path: Path) -> None:
    """Whatever changes a batch changes the digest; where the files are does not."""
    path = bare(tmp_path / "a.bin", [3, EOS, 4, EOS])
    digests = {opened(path, tokenizer).digest()}
    assert {opened(Path(path.rename(tmp_path / "b.bin")), tokenizer).digest()} == digests
    path = tmp_path / "b.bin"
    for changes in ({"validation_fraction": 0.5}, {"boundary": "bos"}, {"dtype": "int64"}):
        digests.add(opened(path, tokenizer, **changes).digest())
    digests.add(opened(path, large_tokenizer).digest())
    digests.add(opened(bare(path, [3, EOS, 5, EOS]), tokenizer).digest())
    assert len(digests) == 6
    prefix = megatron(tmp_path / "m", [[3, EOS], [4, EOS]])
    digests.add(opened(prefix, tokenizer).digest())
    digests.add(opened(megatron(prefix, [[3, EOS, 4, EOS]]), tokenizer).digest())
    assert len(digests) == 8
    # of a large file, blocks of all its parts
    sparse = tmp_path / "large.bin"
    with sparse.open("wb") as file:
        file.truncate(1 << 30)
    before = opened(sparse, tokenizer).digest()
    with sparse.open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\1\0")
    assert opened(sparse, tokenizer).digest() != before


def test_files_are_not_read_into_memory(tokenizer: Path, tmp_path: Path) -> None:
    size = 1 << 34  # a sparse file
    with (tmp_path / "a.bin").open("wb") as file:
        file.write(np.array([3, EOS], np.uint16).tobytes())
        file.truncate(2 * size)
    tokens = opened(tmp_path / "a.bin", tokenizer).open("train")
    assert len(tokens) == size
    assert read_tokens(tokens, size - 4, size, VOCAB).tolist() == [0] * 4
    assert document_ends(tokens, 0, 4).tolist() == [2]
