"""A damaged checkpoint is one error that names every problem; a failed save leaves no files."""

import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.checkpoints import huggingface, safetensors_write
from llama_jax.checkpoints.safetensors_read import read_header
from llama_jax.files.staging import staged_directory

staged = partial(staged_directory, into_existing=True)

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
INDEX = safetensors_write.INDEX_FILE
SINGLE = safetensors_write.SINGLE_FILE


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path / "sharded", max_shard_size=4000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / SINGLE)


def rewrite(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, directory / SINGLE)


def error_of(directory: Path) -> str:
    with pytest.raises(ValueError) as caught:
        LlamaForCausalLM.from_pretrained(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_problems_are_in_one_error(directory):
    tensors = tensors_of(directory)
    del tensors["model.norm.weight"]
    tensors["surplus"] = np.zeros(3, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((16, 24), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 3] = np.nan
    tensors["lm_head.weight"][0, 0] = -np.inf
    tensors["model.layers.1.input_layernorm.weight"] = np.ones(16, np.int32)
    rewrite(directory, tensors)
    message = error_of(directory)
    assert message.startswith(f"{directory}: 6 problems: ")
    for part in (
        "model.norm.weight: missing",
        "surplus: unexpected",
        "model.layers.1.mlp.up_proj.weight: found shape [16, 24], expected [24, 16]",
        "model.layers.0.self_attn.q_proj.weight: holds non-finite values",
        "lm_head.weight: holds non-finite values",
        "model.layers.1.input_layernorm.weight: found dtype I32",
    ):
        assert part in message


@pytest.mark.parametrize("cut", [0, 4, 8, 9, 200, -4097, -1])
def test_a_truncated_file(directory, cut):
    content = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(content[:cut])
    assert SINGLE in error_of(directory)


def test_a_truncated_shard_and_a_missing_one(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    second.write_bytes(second.read_bytes()[:-10])
    first.unlink()
    message = error_of(sharded)
    assert f"{first.name}: cannot be read (No such file or directory)" in message
    assert f"{second.name}: found" in message
    assert "truncated, 1 tensors from" in message
    assert "missing" not in message  # the files explain it


def test_bytes_after_the_end(directory):
    with (directory / SINGLE).open("ab") as file:
        file.write(b"more")
    assert "trailing bytes" in error_of(directory)


def test_flipped_bits_in_the_header(directory):
    """Each is a ValueError or harmless."""
    path = directory / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, 8 + length, 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(0, 8)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(SINGLE)
    assert refused > 100


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"a": {"dtype": "F32", "shape": [1 << 70], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": 3},
        [],
    ],
)
def test_an_inconsistent_header(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        read_header(path)


def test_a_duplicate_name_in_a_header(tmp_path):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = f"{{{entry}, {entry}}}".encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ValueError, match="duplicate key"):
        read_header(path)


def test_a_tensor_in_two_shards(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    both = safetensors.numpy.load_file(first) | safetensors.numpy.load_file(second)
    safetensors.numpy.save_file(both, second)
    name = next(iter(safetensors.numpy.load_file(first)))
    assert f"{name}: in {first.name} and in {second.name}" in error_of(sharded)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "a\0b",
        "\ud800",
        None,
        [],
        {},
    ],
)
def test_an_index_that_leaves_the_directory(sharded, file):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"said to be in {file!r}, expected a file of the directory" in error_of(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": 3}}])
def test_a_bad_index(sharded, index):
    (sharded / INDEX).write_text(json.dumps(index))
    assert INDEX in error_of(sharded)


def test_no_weights(directory):
    (directory / SINGLE).unlink()
    assert "expected weights" in error_of(directory)


def test_no_config(directory):
    (directory / "config.json").unlink()
    assert "config.json: not found" in error_of(directory)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_non_finite_values_of_every_dtype(directory, dtype):
    tensors = {name: array.astype(dtype) for name, array in tensors_of(directory).items()}
    load_dtype = jnp.float32 if dtype == np.float64 else None
    rewrite(directory, tensors)
    LlamaForCausalLM.from_pretrained(directory, dtype=load_dtype)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        tensors["lm_head.weight"][-1, -1] = value
        rewrite(directory, tensors)
        with pytest.raises(ValueError, match=r"lm_head.weight: holds non-finite values"):
            LlamaForCausalLM.from_pretrained(directory, dtype=load_dtype)


def test_a_cast_that_overflows(directory):
    tensors = tensors_of(directory)
    tensors["model.norm.weight"][0] = 1e6
    rewrite(directory, tensors)
    LlamaForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError, match="non-finite values as float16"):
        LlamaForCausalLM.from_pretrained(directory, dtype=jnp.float16)


def test_float64_needs_x64(directory):
    with pytest.raises(ValueError, match="expected jax_enable_x64 to be on"):
        LlamaForCausalLM.from_pretrained(directory, dtype=jnp.float64)


def test_mixed_dtypes_are_widened(directory):
    tensors = tensors_of(directory)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(ml_dtypes.bfloat16)
    rewrite(directory, tensors)
    assert LlamaForCausalLM.from_pretrained(directory).dtype == jnp.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 1 << 40), ("num_hidden_layers", 1 << 40), ("vocab_size", 1 << 50)],
)
def test_an_absurd_size_is_an_error_before_memory_is_allocated(directory, field, value):
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {field: value}))
    assert "expected" in error_of(directory)


@pytest.mark.parametrize("dtype", ["int8", "float33", jnp.complex64])
def test_a_dtype_that_weights_cannot_have(directory, dtype):
    with pytest.raises(ValueError, match=r"dtype: found .* expected one of float64, float32"):
        LlamaForCausalLM.from_pretrained(directory, dtype=dtype)


def test_old_rotary_buffers_are_ignored(directory):
    tensors = tensors_of(directory)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.cos_cached"] = np.ones(2, np.float32)
    rewrite(directory, tensors)
    LlamaForCausalLM.from_pretrained(directory)


def tied_directory(tmp_path: Path) -> Path:
    fields = CONFIG.to_dict() | {"tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields), rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_a_stored_copy_of_a_tied_head(tmp_path):
    directory = tied_directory(tmp_path)
    tensors = tensors_of(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    rewrite(directory, tensors)
    LlamaForCausalLM.from_pretrained(directory)
    tensors["lm_head.weight"][0, 0] += 1
    rewrite(directory, tensors)
    assert "lm_head.weight: differs from the embedding" in error_of(directory)


def test_a_tied_embedding_stored_under_the_heads_name(tmp_path):
    directory = tied_directory(tmp_path)
    tensors = tensors_of(directory)
    before = LlamaForCausalLM.from_pretrained(directory)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    rewrite(directory, tensors)
    after = LlamaForCausalLM.from_pretrained(directory)
    ids = jnp.asarray([[1, 2, 3]])
    assert (before(ids).logits == after(ids).logits).all()


def test_a_bare_decoder_lacks_the_prefix(tmp_path):
    directory = tied_directory(tmp_path)
    tensors = {name.removeprefix("model."): array for name, array in tensors_of(directory).items()}
    before = LlamaForCausalLM.from_pretrained(directory)
    rewrite(directory, tensors)
    after = LlamaForCausalLM.from_pretrained(directory)
    ids = jnp.asarray([[1, 2, 3]])
    assert (before(ids).logits == after(ids).logits).all()


def test_saving_only_replaces_an_earlier_save(sharded):
    (sharded / "tokenizer.json").write_text("{}")
    model = LlamaForCausalLM.from_pretrained(sharded)
    model.save_pretrained(sharded)
    assert {path.name for path in sharded.iterdir()} == {"config.json", SINGLE, "tokenizer.json"}
    LlamaForCausalLM.from_pretrained(sharded)


def test_a_failed_save_leaves_no_files(tmp_path, monkeypatch):
    model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_text", no_space)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_saving_into_a_link_to_another_disk(tmp_path):
    """Like a mounted volume; files are staged inside it, because its parent is on another disk."""
    elsewhere = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        (tmp_path / "link").symlink_to(elsewhere)
        model = LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))
        model.save_pretrained(tmp_path / "link", max_shard_size="4KB")
        LlamaForCausalLM.from_pretrained(elsewhere)
        assert not [path for path in elsewhere.iterdir() if path.name.startswith(".")]
    finally:
        shutil.rmtree(elsewhere)


def test_a_failed_save_removes_the_parents_it_made(tmp_path):
    with pytest.raises(ValueError, match="boom"), staged(tmp_path / "a" / "b" / "c"):
        raise ValueError("boom")
    assert list(tmp_path.iterdir()) == []


def test_concurrent_saves_use_different_staging_directories(tmp_path):
    (tmp_path / "model").mkdir()
    with staged(tmp_path / "model") as one, staged(tmp_path / "model") as other:
        assert one != other
    assert list((tmp_path / "model").iterdir()) == []


def test_loading_does_not_copy_the_buffers(directory):
    """JAX on the CPU adopts memory on 64-byte boundaries, so the peak is one model instead of two."""
    buffer = huggingface._aligned((1000,), np.float32)
    import jax

    assert jax.device_put(buffer).unsafe_buffer_pointer() == buffer.ctypes.data
