"""Arrow data sets and ArrayRecord files of ids, written by pyarrow, array_record and protobuf."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from parity_tests.train.corpus import documents_of, word_tokenizer
from parity_tests.train.data.formats.opened import error_of, opened
from parity_tests.train.data.formats.writers import Documents
from train.data.documents import read_documents
from train.data.formats.example import example_features, int64_values
from train.data.token_shards import open_tokens
from train.data.tokenize import tokenize
from train.data.tokens import Source, document_ends, loss_mask, read_tokens

EOS, VOCAB = 1, 300
DOCUMENTS = [[3, 4, EOS], [299, EOS], [5], [6, 7, 8, 9, 10, EOS], [11, EOS]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["<s>", "<|endoftext|>", "<unk>", *(f"w{n}" for n in range(VOCAB - 3))]
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"), words)


def write_arrow(path: Path, column: Any, name: str = "input_ids", *, rows: int = 2) -> Path:
    """A file as `datasets.Dataset.save_to_disk` writes it: the stream format, in record batches."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"other": range(len(column)), name: column})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def saved_data_set(folder: Path, documents: Documents, shards: int = 1) -> Path:
    names = []
    for number in range(shards):
        names.append(f"data-{number:05}-of-{shards:05}.arrow")
        first, last = (len(documents) * n // shards for n in (number, number + 1))
        part = documents[first:last]
        write_arrow(folder / names[-1], pa.array(part, pa.list_(pa.int32())))
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def write_records(path: Path, records: list[bytes], options: str = "group_size:2") -> Path:
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def raw(documents: Documents, dtype: str = "uint16") -> list[bytes]:
    return [np.array(ids, dtype).tobytes() for ids in documents]


@pytest.fixture(scope="session")
def example_class() -> Any:
    """tf.train.Example, as protobuf itself encodes it."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str, bool]) -> Any:
        added = file.message_type.add(name=name)
        for field, number, kind, type_name, repeated in fields:
            described = {"type_name": type_name} if type_name else {}
            label = 3 if repeated else 1
            added.field.add(name=field, number=number, type=kind, label=label, **described)
        return added

    nested, integer, data, text, number = 11, 3, 12, 9, 2
    message("BytesList", ("value", 1, data, "", True))
    message("FloatList", ("value", 1, number, "", True))
    message("Int64List", ("value", 1, integer, "", True))
    message(
        "Feature",
        *(
            (f"{name}_list", place, nested, f".t.{name.title()}List", False)
            for place, name in enumerate(("bytes", "float", "int64"), 1)
        ),
    )
    features = message("Features", ("feature", 1, nested, ".t.Features.FeatureEntry", True))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=text, label=1)
    entry.field.add(name="value", number=2, type=nested, type_name=".t.Feature", label=1)
    message("Example", ("features", 1, nested, ".t.Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def check(source: Source, documents: Documents) -> None:
    tokens = source.open("train")
    flat = [token for document in documents for token in document]
    assert documents_of(tokens) == documents
    ends = np.cumsum([len(document) for document in documents]).tolist()
    for start in range(len(flat)):
        for stop in range(start + 1, len(flat) + 1):
            assert read_tokens(tokens, start, stop, VOCAB).tolist() == flat[start:stop]
            expected = [end for end in ends if start < end <= stop]
            assert document_ends(tokens, start, stop).tolist() == expected


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())],
    ids=str,
)
def test_arrow(kind: pa.DataType, tokenizer: Path, tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", pa.array(DOCUMENTS, kind))
    check(opened(path, tokenizer), DOCUMENTS)


def test_arrow_files_of_other_kinds(tokenizer: Path, tmp_path: Path) -> None:
    rows = [[3, 4], [5, 6], [7, 8]]
    path = write_arrow(tmp_path / "a.arrow", pa.array(rows, pa.list_(pa.int32(), 2)), "tokens")
    check(opened(path, tokenizer, column="tokens"), rows)
    table = pa.table({"input_ids": [[3], [], [4, 5]]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    # rows without ids are no documents
    check(opened(path, tokenizer), [[3], [4, 5]])


def test_a_data_set_with_splits(tokenizer: Path, tmp_path: Path) -> None:
    saved_data_set(tmp_path / "d" / "train", DOCUMENTS, shards=2)
    saved_data_set(tmp_path / "d" / "validation", [[20, EOS]])
    saved_data_set(tmp_path / "d" / "test", [[21, EOS]])
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    # what `map` leaves in the folder is not of the data set
    write_arrow(tmp_path / "d" / "train" / "cache-0123.arrow", pa.array([[9]]))
    source = opened(tmp_path / "d", tokenizer)
    check(source, DOCUMENTS)
    assert documents_of(source.open("validation")) == [[20, EOS]]
    (tmp_path / "d" / "train" / "data-00001-of-00002.arrow").unlink()
    assert error_of(lambda: opened(tmp_path / "d", tokenizer).open("train")) == (
        f"{tmp_path}/d/train/data-00001-of-00002.arrow: no such file, but state.json lists it"
    )


def test_wrong_arrow_files(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"

    def message(**options: Any) -> str:
        return error_of(lambda: opened(path, tokenizer, **options).open("train"))

    write_arrow(path, pa.array(["a"]), "text")
    assert message() == (
        f"{path}: found columns other, text, expected 'input_ids': tokenize it first, "
        "`python -m train tokenize`"
    )
    write_arrow(path, pa.array([[3]]), "ids")
    assert message() == (
        f"{path}: found columns other, ids, expected 'input_ids': name that of the ids with --tokens.column"
    )
    assert message(column="other") == (
        f"{path}: found int64 as column 'other', expected lists of integers"
    )
    write_arrow(path, pa.array([[3], None]))
    assert message() == f"{path}: found null in column 'input_ids', expected lists of integers"
    write_arrow(path, pa.array([[]], pa.list_(pa.int32())))
    assert message() == f"{path}: found no ids in column 'input_ids'"
    write_arrow(path, pa.array([[3, 4, 900]]))
    source = opened(path, tokenizer)
    assert error_of(lambda: source.require_intact(["train"], 1 << 20)) == (
        f"{path}, batch 0, token 2: found id 900, expected less than the tokenizer's vocabulary of {VOCAB}"
    )
    content = path.read_bytes()
    for damaged in (b"", b"text", content[:100]):
        path.write_bytes(damaged)
        assert message().startswith(f"{path}: not a valid Arrow file (")


def test_text_in_arrow_files_is_read_as_documents(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "d" / "data-0.arrow", pa.array(["a b", "", "c", "d\n"]), "text")
    (tmp_path / "d" / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    write_arrow(tmp_path / "d" / "cache-1.arrow", pa.array(["no"]), "text")
    assert [*read_documents([tmp_path / "d"])] == ["a b", "c", "d\n"]
    write_arrow(path, pa.array(["a", None]), "text")
    assert error_of(lambda: [*read_documents([path])]) == (
        f"{path}, row 2: found null as 'text', expected a string"
    )
    assert error_of(lambda: [*read_documents([path], text_field="other")]) == (
        f"{path}: found int64 as column 'other', expected string"
    )
    path.write_bytes(b"text")
    assert error_of(lambda: [*read_documents([path])]).startswith(
        f"{path}: not a valid Arrow file ("
    )


@pytest.mark.parametrize("options", ["group_size:1", "group_size:3,uncompressed"])
def test_array_records_of_ids(options: str, tokenizer: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.array_record", raw(DOCUMENTS), options)
    check(opened(path, tokenizer), DOCUMENTS)
    (cached,) = (tmp_path / "cache" / "llama_jax").iterdir()
    before = cached.stat().st_mtime_ns
    check(opened(path, tokenizer), DOCUMENTS)
    assert cached.stat().st_mtime_ns == before
    path = write_records(tmp_path / "b.array_record", raw(DOCUMENTS, "int64"))
    check(opened(path, tokenizer, dtype="int64"), DOCUMENTS)


def test_array_records_of_examples(example_class: Any, tokenizer: Path, tmp_path: Path) -> None:
    records = []
    for ids in DOCUMENTS:
        example = example_class()
        example.features.feature["text"].bytes_list.value.append(b"x")
        example.features.feature["input_ids"].int64_list.value.extend(ids)
        records.append(example.SerializeToString())
    path = write_records(tmp_path / "a.array_record", records)
    check(opened(path, tokenizer), DOCUMENTS)
    for column, shown in (("text", "text"), ("tokens", "tokens")):
        message = error_of(
            lambda column=column: opened(path, tokenizer, column=column).open("train")
        )
        assert message.startswith(f"{path}: found a tf.train.Example with ")
        assert message.endswith(
            f"expected an int64_list {shown!r}: name that of the ids with --tokens.column"
        )


@pytest.mark.parametrize(
    ("name", "masked"), [("labels", -100), ("loss_mask", 0), ("attention_mask", 0)]
)
def test_masks_in_examples_are_not_ignored(
    name: str, masked: int, example_class: Any, tokenizer: Path, tmp_path: Path
) -> None:
    def write(last: int) -> Path:
        example = example_class()
        example.features.feature["input_ids"].int64_list.value.extend([3, 4])
        example.features.feature[name].int64_list.value.extend([1, last])
        return write_records(tmp_path / "a.array_record", [example.SerializeToString()])

    path = write(1)
    assert documents_of(opened(path, tokenizer).open("train")) == [[3, 4]]
    write(masked)
    assert error_of(lambda: opened(path, tokenizer).open("train")) == (
        f"{path}: found {masked} in {name!r}, ids that are not in the loss: such masks are read from Arrow "
        "files, not from ArrayRecord"
    )


def test_examples_as_protobuf_encodes_them(example_class: Any) -> None:
    values = [0, 1, 127, 128, 65_535, 2**31 - 1, 2**63 - 1, -1, -(2**63)]
    example = example_class()
    example.features.feature["a"].int64_list.value.extend(values)
    example.features.feature["b"].float_list.value.append(1.5)
    example.features.feature["c"].int64_list.SetInParent()
    record = example.SerializeToString()
    features = example_features(record)
    assert features is not None
    assert features.keys() == {"a", "b", "c"}
    assert features["b"] is None
    assert features["a"] is not None
    assert features["c"] is not None
    assert int64_values(features["a"]).tolist() == values
    assert int64_values(features["c"]).tolist() == []
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, VOCAB, rng.integers(1, 40), dtype=np.uint16)
        assert example_features(ids.tobytes()) is None
    for length in range(1, len(record)):
        features = example_features(record[:length])  # no error but ValueError, which means None
        assert features is None or features.keys() < {"a", "b", "c"}


def test_the_names_of_sharded_array_records(tokenizer: Path, tmp_path: Path) -> None:
    for split, token in (("train", 3), ("validation", 4)):
        for shard in range(2):
            name = f"c4-{split}.array_record-{shard:05}-of-00002"
            write_records(tmp_path / name, raw([[token + 10 * shard, EOS]]))
    source = opened(tmp_path, tokenizer)
    assert documents_of(source.open("train")) == [[3, EOS], [13, EOS]]
    assert documents_of(source.open("validation")) == [[4, EOS], [14, EOS]]


def test_wrong_array_records(tokenizer: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.array_record", [b"\1\0\2"])

    def message(**options: Any) -> str:
        return error_of(lambda: opened(path, tokenizer, **options).open("train"))

    assert message() == (
        f"{path}: found a record of 3 bytes, expected a multiple of 2 for uint16: of another "
        "--tokens.dtype?"
    )
    write_records(path, raw([[*range(3, 40)]], "uint32"))
    assert message() == (
        f"{path}: every other uint16 is 0, so the ids are wider: name their dtype with --tokens.dtype"
    )
    content = path.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 3]):
        path.write_bytes(damaged)
        assert message() == f"{path}: not an ArrayRecord file, truncated, or without records"


def test_a_data_set_with_splits_keeps_them(tokenizer: Path, tmp_path: Path) -> None:
    """The hash of a text decides only where there is no split for validation."""
    texts = {"train": ["w0", "w1 w2", "w3"], "validation": ["w4"], "test": ["w5"]}
    for split, column in texts.items():
        write_arrow(tmp_path / "d" / split / "data-0.arrow", pa.array(column), "text")
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": [*texts]}))
    tokenize([tmp_path / "d"], tokenizer, tmp_path / "out", validation_fraction=0.9)
    assert documents_of(open_tokens(tmp_path / "out", "train")) == [[3, EOS], [4, 5, EOS], [6, EOS]]
    assert documents_of(open_tokens(tmp_path / "out", "validation")) == [[7, EOS]]
    shutil.rmtree(tmp_path / "d" / "validation")
    index = tokenize([tmp_path / "d"], tokenizer, tmp_path / "hashed", validation_fraction=0.999999)
    assert sum(shard.documents for shard in index.splits["validation"]) == 3


def test_a_data_set_from_the_hub_keeps_its_splits(tokenizer: Path, tmp_path: Path) -> None:
    """What is for tests is not trained on."""
    folder = tmp_path / "d" / "data"
    folder.mkdir(parents=True)
    names = {"w0": "train-00000-of-00002", "w1": "train_sft-00001-of-00002-0a1b", "w2": "testing"}
    names |= {
        "w3": "validation-00000-of-00001",
        "w4": "test-00000-of-00001",
        "w5": "test_sft-00000-of-00001",
    }
    for text, name in names.items():
        pq.write_table(pa.table({"text": [text]}), folder / f"{name}.parquet")
    tokenize([tmp_path / "d"], tokenizer, tmp_path / "out", validation_fraction=0)
    # the files are sorted by name
    assert documents_of(open_tokens(tmp_path / "out", "train")) == [[5, EOS], [3, EOS], [4, EOS]]
    assert documents_of(open_tokens(tmp_path / "out", "validation")) == [[6, EOS]]
    (folder / "validation-00000-of-00001.parquet").unlink()
    index = tokenize([tmp_path / "d"], tokenizer, tmp_path / "hashed", validation_fraction=0.999999)
    assert sum(shard.documents for shard in index.splits["validation"]) == 3
    assert list(read_documents([folder / "test-00000-of-00001.parquet"])) == ["w4"]
    for file in folder.glob("train*"):
        file.unlink()
    assert sorted(read_documents([folder])) == ["w2", "w4", "w5"]


def test_loss_masks_in_arrow_files(tokenizer: Path, tmp_path: Path) -> None:
    """The columns of tokenized chats, by the names that TRL and transformers give them."""
    ids = [[3, 4, 5, EOS], [6, 7, EOS]]
    masks = {
        "labels": [[-100, 4, 5, EOS], [-100, -100, EOS]],
        "assistant_masks": [[0, 1, 1, 1], [0, 1, 1]],
        "completion_mask": [[1, 1, 1, 0], [1, 1, 1]],
    }
    for names, expected in (
        (["labels"], [0, 1, 1, 1, 0, 0, 1]),
        (["assistant_masks"], [0, 1, 1, 1, 0, 1, 1]),
        ([*masks], [0, 1, 1, 0, 0, 0, 1]),
    ):
        table = pa.table({"input_ids": ids} | {name: masks[name] for name in names})
        path = tmp_path / "a.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        tokens = opened(path, tokenizer).open("train")
        mask = loss_mask(tokens, 0, len(tokens))
        assert mask is not None
        assert mask.tolist() == [bool(value) for value in expected]
        for start in range(7):
            for stop in range(start + 1, 8):
                part = loss_mask(tokens, start, stop)
                assert part is not None
                assert part.tolist() == mask[start:stop].tolist()
    table = pa.table({"input_ids": ids, "labels": [[3], [1, 2]]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert error_of(lambda: opened(path, tokenizer).open("train")) == (
        f"{path}: the rows of column 'labels' have other lengths than 'input_ids'"
    )


def write_columns(path: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def test_padded_rows(tokenizer: Path, tmp_path: Path) -> None:
    """Padding, as `tokenizer(..., padding="max_length")` leaves it, is not in the loss."""
    ids = [[3, 4, EOS, EOS, EOS], [5, 6, 7, 8, EOS], [9, EOS, EOS, EOS, EOS]]
    kept = [[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    mask = pa.array(kept, pa.list_(pa.int8()))
    path = write_columns(tmp_path / "a.arrow", input_ids=ids, attention_mask=mask)
    tokens = opened(path, tokenizer).open("train")
    in_loss = loss_mask(tokens, 0, 15)
    assert in_loss is not None
    assert in_loss.tolist() == [bool(one) for row in kept for one in row]
    ones = [[1] * 5] * 3
    for whole in (ones, [[True] * 5] * 3):
        write_columns(path, input_ids=ids, attention_mask=whole)
        assert opened(path, tokenizer).open("train").in_loss is None
    # tokens would attend to padding before them
    write_columns(path, input_ids=ids, attention_mask=[[1] * 5, [0, 0, 1, 1, 1], [1] * 5])
    assert error_of(lambda: opened(path, tokenizer).open("train")) == (
        f"{path}: row 2 of a batch has padding before tokens ('attention_mask' is 0), expected it after "
        "them, or none"
    )


def test_labels_that_are_shifted(tokenizer: Path, tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.arrow", input_ids=[[3, 4, 5]], labels=[[-100, 5, EOS]])
    assert error_of(lambda: opened(path, tokenizer).open("train")) == (
        f"{path}: token 1: found label 5 for id 4, expected the ids of 'input_ids' as 'labels', not "
        "shifted, or -100"
    )


@pytest.mark.parametrize("key", ["_indices_data_files", "_indices_files"])
def test_a_data_set_with_indices(key: str, tokenizer: Path, tmp_path: Path) -> None:
    """Saved after a shuffle or filter by a version that kept the indices apart."""
    folder = saved_data_set(tmp_path / "d", DOCUMENTS)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {key: None}))
    check(opened(folder, tokenizer), DOCUMENTS)
    (folder / "state.json").write_text(json.dumps(state | {key: [{"filename": "indices.arrow"}]}))
    for message in (
        error_of(lambda: opened(folder, tokenizer).open("train")),
        error_of(lambda: tokenize([folder], tokenizer, tmp_path / "out")),
    ):
        assert message == (
            f"{folder}: its rows are selected by a file of indices (state.json): load it with datasets, "
            "and save it again after flatten_indices()"
        )


def test_the_cache_of_datasets(tokenizer: Path, tmp_path: Path) -> None:
    """What `map` and `filter` left there are copies of the rows."""
    folder = tmp_path / "d"
    write_arrow(folder / "name-train.arrow", pa.array(DOCUMENTS))
    write_arrow(folder / "cache-0123abcd.arrow", pa.array(DOCUMENTS[1:]))
    write_arrow(folder / "cache-45_00001_of_00002.arrow", pa.array(DOCUMENTS[:1]))
    (folder / "dataset_info.json").write_text("{}")
    check(opened(folder, tokenizer), DOCUMENTS)
    check(opened(folder / "cache-0123abcd.arrow", tokenizer), DOCUMENTS[1:])
