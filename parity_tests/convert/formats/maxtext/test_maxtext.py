"""MaxText's checkpoints, in and out: trees as MaxText 0.2.5 saves them, and by MaxText itself."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import convert
from convert.__main__ import main
from convert.formats import huggingface
from convert.formats.trees import read as trees
from llama_jax.checkpoints.orbax import quiet_orbax
from llama_jax.load import load_model
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model
from parity_tests.convert.formats.maxtext.tiny_maxtext import (
    HALVES,
    PAIRS,
    Tensors,
    full_state,
    maxtext_leaves,
    save,
)
from parity_tests.convert.test_conversion import peak_memory
from parity_tests.convert.test_damage import flip, truncate

# sqrt(head_dim) is 4, so that queries lose nothing
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A model whose directory is tmp_path / "model"."""
    model = tiny_model(tie_word_embeddings=False, **SIZES)
    model.save_pretrained(tmp_path / "model")
    return model


def tensors_of(directory: Path) -> Tensors:
    return load_file(directory / "model.safetensors")


def with_config(directory: Path, model: Path) -> Path:
    (directory / "config.json").write_bytes((model / "config.json").read_bytes())
    return directory


def require_same(directory: Path, expected: Tensors) -> None:
    tensors = tensors_of(directory)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert tensors[name].dtype == values.dtype, name
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)


LAYOUTS: dict[str, Callable[[Tensors], dict[str, Any]]] = {
    "state": full_state,
    "params": lambda leaves: {f"params/params/{path}": v for path, v in leaves.items()},
    "bare": lambda leaves: {
        f"{path}/value" if path.startswith("decoder") else path: v for path, v in leaves.items()
    },
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
def test_every_layout_is_read(
    model: Any, tmp_path: Path, layout: str, scanned: bool, pairs: bool
) -> None:
    expected = tensors_of(tmp_path / "model")
    dtype = np.float32 if pairs else ml_dtypes.bfloat16
    expected = {name: values.astype(dtype) for name, values in expected.items()}
    leaves = maxtext_leaves(expected, model.config, scanned=scanned, pairs=pairs)
    step = tmp_path / "run" / "checkpoints" / "7"
    save(LAYOUTS[layout](leaves), step / "items", use_zarr3=scanned)
    with_config(tmp_path / "run", tmp_path / "model")
    for number, source in enumerate((tmp_path / "run", step, step / "items")):
        out = convert.convert(
            source, tmp_path / f"out{number}", rope="pairs" if pairs else "halves"
        )
        require_same(out, expected)
        if layout != "state":
            break


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("values", [1, 300, 2**21])
def test_layers_are_read_by_pieces(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int, disk: bool
) -> None:
    """Pieces that divide every axis and span layers, one or more at once, and memory for two layers.

    Each piece is decoded once, and the layers wait on the disk; where that has no place, two are read at a
    time.
    """
    expected = tensors_of(tmp_path / "model")
    leaves = maxtext_leaves(expected, model.config)
    source = save(full_state(leaves), tmp_path / "items", chunk_byte_size=1000)
    with_config(source, tmp_path / "model")
    name = "params.params.decoder.layers.mlp.wo.kernel"
    (array,) = (array for array in trees.open_arrays(source) if array.name == name)
    assert any(c < n for c, n in zip(array.chunk_shape, array.store.shape, strict=True))
    monkeypatch.setattr(trees, "_VALUES", values)
    monkeypatch.setattr(trees._Reader, "_layers_at_a_time", lambda self, source: 2)
    if not disk:
        monkeypatch.setattr(trees, "scratch_file", lambda nbytes: None)
    read: list[tuple[str, tuple[tuple[int, int], ...]]] = []
    start_reading = trees.start_reading

    def count(store: Any, dtype: Any) -> Any:
        path = store.kvstore.path
        read.append((path, tuple(zip(store.domain.inclusive_min, store.shape, strict=True))))
        return start_reading(store, dtype)

    monkeypatch.setattr(trees, "start_reading", count)
    require_same(convert.convert(source, tmp_path / "out", rope="halves"), expected)
    layers = {extent[1] for path, extent in read if "wo" in path}
    assert layers == ({(0, SIZES["num_hidden_layers"])} if disk else {(0, 2), (2, 1)})
    assert len(read) == len(set(read))


def test_a_disk_without_room_for_the_layers_that_wait(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the destination's, which is named; where too little is free from the start, none wait."""
    leaves = maxtext_leaves(tensors_of(tmp_path / "model"), model.config)
    source = with_config(save(leaves, tmp_path / "items"), tmp_path / "model")
    monkeypatch.setattr(trees._Reader, "_layers_at_a_time", lambda self, source: 2)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/out'") as caught:
        convert.convert(source, tmp_path / "out", rope="halves")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(file.name for file in tmp_path.iterdir()) == ["items", "model"]
    monkeypatch.setattr(convert.conversion.Plan, "spare_disk", 100)
    convert.convert(source, tmp_path / "out", rope="halves")


def test_a_padded_vocabulary_is_cut(model: Any, tmp_path: Path) -> None:
    expected = tensors_of(tmp_path / "model")
    padded = {
        name: np.pad(values, ((0, 24), (0, 0))) if values.shape == (40, 32) else values
        for name, values in expected.items()
    }
    source = save(maxtext_leaves(padded, model.config), tmp_path / "items")
    with_config(source, tmp_path / "model")
    notes = convert.info(source, rope="halves")["notes"]
    assert sum("24 rows beyond the vocabulary of 40 are left out" in note for note in notes) == 2
    require_same(convert.convert(source, tmp_path / "out", rope="halves"), expected)


SETTINGS = "rope_max_timescale: 50_000\nnormalization_layer_epsilon: 1e-3\n"


def test_settings_stand_in_for_a_config(model: Any, tmp_path: Path) -> None:
    expected = tensors_of(tmp_path / "model")
    source = save(maxtext_leaves(expected, model.config, pairs=True), tmp_path / "items")
    (source / "config.yml").write_text(PAIRS.replace("false", "true") + SETTINGS)
    out = convert.convert(source, tmp_path / "out")
    require_same(out, expected)
    config = convert.info(source)["config"]
    assert config["rope_parameters"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 50000.0,
    }
    assert config["rms_norm_eps"] == 1e-3
    shape = {name: config[name] for name in SIZES}
    assert shape == SIZES
    assert (config["vocab_size"], config["intermediate_size"]) == (40, 48)
    (source / "config.yml").write_text(HALVES + "rope_linear_scaling_factor: 2\n")
    config = convert.info(source)["config"]
    assert config["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 10000.0,
    }


def test_tied_logits_are_normalized_by_the_final_norm(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True, **SIZES)
    model.save_pretrained(tmp_path / "model")
    expected = tensors_of(tmp_path / "model")
    source = save(maxtext_leaves(expected, model.config), tmp_path / "items")
    with_config(source, tmp_path / "model")
    with pytest.raises(ValueError, match="do not tell whether MaxText divides the logits"):
        convert.plan(source, tmp_path / "out", rope="halves")
    (source / "config.yml").write_text(HALVES)
    settings = {"normalization_layer_epsilon": 1e-5}
    (source / "config.yml").write_text(HALVES + yaml.safe_dump(settings))
    norm = expected["model.norm.weight"].astype(np.float64) / np.sqrt(32)
    divided = expected | {"model.norm.weight": norm.astype(np.float32)}
    require_same(convert.convert(source, tmp_path / "out"), divided)
    assert any("divides tied logits" in note for note in convert.info(source)["notes"])
    settings["normalize_embedding_logits"] = False  # type: ignore[assignment]
    (source / "config.yml").write_text(HALVES + yaml.safe_dump(settings))
    require_same(convert.convert(source, tmp_path / "plain"), expected)


def error_of(source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        convert.convert(source, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def test_refusals(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, out = tensors_of(tmp_path / "model"), tmp_path / "out"
    source = save(maxtext_leaves(expected, model.config), tmp_path / "items")
    settings = source / "config.yml"
    assert "found neither a config.json nor MaxText's config.yml" in error_of(source, out)
    with_config(source, tmp_path / "model")
    assert "do not tell the order of the rows" in error_of(source, out)
    assert main([str(source), str(out)]) == 2
    assert "add --rope halves" in capsys.readouterr().err
    assert "rope: found 'both', expected" in error_of(source, out, rope="both")
    settings.write_text(SETTINGS)  # tells nothing of the order
    assert "config.yml and config.json differ: rms_norm_eps" in error_of(source, out, rope="halves")
    settings.write_text("normalization_layer_epsilon: 1.0e-5\n")
    assert "do not tell the order of the rows" in error_of(source, out)
    settings.write_text(PAIRS)
    assert "rope: found halves, but config.yml" in error_of(source, out, rope="halves")
    for text, message in (
        ("rope_type: yarn", "rope_type: found 'yarn', expected default or llama3.1"),
        ("decoder_block: mistral", "decoder_block: found 'mistral', expected 'llama2'"),
        ("use_qk_norm: true", "use_qk_norm: found True, expected False"),
        ("a: [", "not valid YAML"),
        ("- a", "found a list, expected MaxText's settings"),
        ("rope_max_timescale: many", "rope_max_timescale: found 'many', expected a number"),
    ):
        settings.write_text(text)
        assert message in error_of(source, out, rope="halves")
    settings.unlink()
    assert "for MaxText and maps of names only, not for Hugging Face" in error_of(
        tmp_path / "model", out, rope="halves"
    )


def test_problems_of_arrays_are_told_together(model: Any, tmp_path: Path) -> None:
    expected = tensors_of(tmp_path / "model")
    leaves = maxtext_leaves(expected, model.config)
    del leaves["decoder/decoder_norm/scale"]
    leaves["decoder/layers/mlp/wo/kernel"] = np.zeros((3, 3, 3), np.float32)
    leaves["decoder/layers/mlp/wi_0/kernel"] = leaves["decoder/layers/mlp/wi_0/kernel"].astype("i4")
    leaves["decoder/layers/mlp/bias"] = np.zeros((3, 3), np.float32)
    source = save(leaves, tmp_path / "items")
    with_config(source, tmp_path / "model")
    message = error_of(source, tmp_path / "out", rope="halves")
    assert "model.norm.weight: missing, no array is mapped to it" in message
    assert "decoder/layers/mlp/wo/kernel: found shape [3, 3], expected [48, 32]" in message
    assert "decoder/layers/mlp/wi_0/kernel: found dtype I32, expected F64" in message
    assert "decoder/layers/mlp/bias: unexpected" in message
    assert str(source) in message


def test_the_library_says_how_to_convert_one(model: Any, tmp_path: Path) -> None:
    leaves = maxtext_leaves(tensors_of(tmp_path / "model"), model.config)
    save(full_state(leaves), tmp_path / "run/checkpoints/3/items")
    with pytest.raises(ValueError, match=r"an Orbax checkpoint of another program; convert it"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("scaling", [False, True])
def test_what_is_written_is_what_maxtext_saves(
    tmp_path: Path, scan_layers: bool, scaling: bool
) -> None:
    """Restored by Orbax alone, onto a device of the reader's choice."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if scaling:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model(
        tie_word_embeddings=scaling, rope_parameters=rope, max_position_embeddings=16384, **SIZES
    )
    model.save_pretrained(tmp_path / "model")
    expected = tensors_of(tmp_path / "model")
    out = convert.convert(
        tmp_path / "model", tmp_path / "out", to="maxtext", scan_layers=scan_layers
    )
    leaves = maxtext_leaves(expected, model.config, scanned=scan_layers, pairs=scaling)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract: dict[str, Any] = {}
    for path, values in leaves.items():
        *parents, last = ("params", "params", *path.split("/"))
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=device)
    with quiet_orbax(), ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / "0/items", abstract)
    for path, values in leaves.items():
        node = restored["params"]["params"]
        for key in path.split("/"):
            node = node[key]
        np.testing.assert_array_equal(node, values, err_msg=path)
    settings = yaml.safe_load((out / "config.yml").read_text())
    assert settings["rope_type"] == ("llama3.1" if scaling else "default")
    assert settings["logits_via_embedding"] is scaling
    require_same(convert.convert(out, tmp_path / "back"), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_queries_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    """sqrt(head_dim) is no power of 2 here: what comes back is as near as can be, and stays."""
    model = tiny_model(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    )
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    convert.convert(tmp_path / "model", tmp_path / "one", to="maxtext")
    convert.convert(tmp_path / "one", tmp_path / "back")
    convert.convert(tmp_path / "back", tmp_path / "two", to="maxtext")
    before, after = (tensors_of(tmp_path / name) for name in ("model", "back"))
    name = "model.layers.0.self_attn.q_proj.weight"
    require_same(tmp_path / "back", before | {name: after[name]})
    assert (before[name] != after[name]).any()
    spacing = float(ml_dtypes.finfo(dtype).eps)
    old, new = (tensors[name].astype(np.float64) for tensors in (before, after))
    assert (abs(new - old) <= spacing * abs(old)).all()
    notes = convert.plan(tmp_path / "model", tmp_path / "x", to="maxtext").notes
    assert "queries are stored divided by sqrt(8), which rounds them" in notes
    require_same(convert.convert(tmp_path / "two", tmp_path / "again"), after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: found 'dynamic', expected default, linear or llama3",
        ),
        (
            {
                "max_position_embeddings": 16384,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            "rope_parameters['factor']: found 32.0, expected 8.0",
        ),
    ],
)
def test_what_maxtext_cannot_hold(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    tiny_model(**options).save_pretrained(tmp_path / "model")
    error = error_of(tmp_path / "model", tmp_path / "out", to="maxtext")
    assert f"MaxText cannot hold this model: {message}" in error
    assert "scan_layers is for MaxText only" in error_of(
        tmp_path / "model", tmp_path / "out", scan_layers=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip])
def test_damage_is_an_error_of_one_line(
    model: Any, tmp_path: Path, damage: Callable[[Path, random.Random], str]
) -> None:
    """Of a checkpoint that has no digests: a flipped number is a number, a lost one is an error."""
    leaves = maxtext_leaves(tensors_of(tmp_path / "model"), model.config)
    source = save(leaves, tmp_path / "items", use_zarr3=True)
    (source / "config.yml").write_text(HALVES)
    files = sorted(f for f in source.rglob("*") if f.is_file() and f.suffix != ".yml")
    rng, errors = random.Random(0), 0
    for case in range(100):
        file = rng.choice(files)
        content = file.read_bytes()
        what = damage(file, rng)
        try:
            convert.convert(source, tmp_path / f"out{case}", verify=False)
        except ValueError as error:
            errors += 1
            assert str(tmp_path) in str(error), what
            assert "\n" not in str(error), what
            assert not (tmp_path / f"out{case}").exists()
        file.write_bytes(content)
    # Orbax names files at random, so that the ones that are chosen differ
    assert errors > (20 if damage is truncate else 5)


@pytest.mark.slow
def test_memory_of_stacks(tmp_path: Path) -> None:
    """Peak RSS <= 600 MB + 3 x the largest tensor, 16 of which are in a stack without a piece for each."""
    layers, hidden, inner = 16, 1024, 16384
    model = tiny_model(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1
    )
    config = model.config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = hidden, inner, layers
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 16, 4, 4
    shapes = {
        "token_embedder/embedding": (40, hidden),
        "decoder/decoder_norm/scale": (hidden,),
        "decoder/logits_dense/kernel": (hidden, 40),
        "decoder/layers/pre_self_attention_layer_norm/scale": (hidden, layers),
        "decoder/layers/post_self_attention_layer_norm/scale": (hidden, layers),
        "decoder/layers/self_attention/query/kernel": (hidden, layers, 4, 16),
        "decoder/layers/self_attention/key/kernel": (hidden, layers, 4, 16),
        "decoder/layers/self_attention/value/kernel": (hidden, layers, 4, 16),
        "decoder/layers/self_attention/out/kernel": (4, layers, 16, hidden),
        "decoder/layers/mlp/wi_0/kernel": (hidden, layers, inner),
        "decoder/layers/mlp/wi_1/kernel": (hidden, layers, inner),
        "decoder/layers/mlp/wo/kernel": (inner, layers, hidden),
    }
    generator = np.random.default_rng(0)
    leaves = {
        path: generator.standard_normal(shape, np.float32) / 8 for path, shape in shapes.items()
    }
    source = save(leaves, tmp_path / "items", chunk_byte_size=2**24, use_zarr3=True)
    config.save_pretrained(source)
    (source / "config.yml").write_text(HALVES + "normalization_layer_epsilon: 1.0e-5\n")
    assert peak_memory(source, tmp_path / "out") <= 600e6 + 3 * hidden * inner * 4
    name = "model.layers.11.mlp.down_proj.weight"
    np.testing.assert_array_equal(
        huggingface.read(tmp_path / "out").load(name),
        leaves["decoder/layers/mlp/wo/kernel"][:, 11].T,
    )


MAXTEXT_PYTHON = os.environ.get("MAXTEXT_PYTHON")
RUN = (
    "hardware=cpu run_name=run base_output_directory=unused max_target_length=16 per_device_batch_size=1 "
    "skip_jax_distributed_system=true attention=dot_product dtype=float32 matmul_precision=highest "
    "float32_logits=true float32_qk_product=true logits_dot_in_fp32=true log_config=false"
)
MODEL = (
    "base_emb_dim=32 base_num_query_heads=4 base_num_kv_heads=2 base_num_decoder_layers=3 base_mlp_dim=48 "
    "vocab_size=64"
)


def maxtext_logits(tokens: np.ndarray, folder: Path, *arguments: str) -> np.ndarray:
    """Run MaxText in its own interpreter."""
    assert MAXTEXT_PYTHON is not None
    np.save(folder / "tokens.npy", tokens.astype(np.int32))
    script = Path(__file__).with_name("maxtext_program.py")
    files = [str(folder / "tokens.npy"), str(folder / "logits.npy")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
    done = subprocess.run(
        [MAXTEXT_PYTHON, script, *files, *arguments, *RUN.split()],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.asarray(np.load(folder / "logits.npy"))


def torch_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return np.asarray(model(torch.tensor(tokens)).logits.numpy())


TOKENS = np.random.default_rng(0).integers(0, 64, (1, 16))


@pytest.mark.slow
@pytest.mark.skipif(
    MAXTEXT_PYTHON is None, reason="MAXTEXT_PYTHON names no interpreter with MaxText"
)
@pytest.mark.parametrize(
    "settings",
    [
        "rope_type=default",
        "rope_type=default scan_layers=false",
        "rope_type=llama3.1",
        # the root of 16 rounds no query as it is multiplied in
        "rope_type=default weight_dtype=bfloat16 head_dim=16",
    ],
)
def test_what_maxtext_saved_has_its_logits(tmp_path: Path, settings: str) -> None:
    if "head_dim" not in settings:
        settings += " head_dim=8"
    expected = maxtext_logits(
        TOKENS, tmp_path, "--save", str(tmp_path / "run/0"), *MODEL.split(), *settings.split()
    )
    kind = settings.split()[0].replace("=", ": ")
    (tmp_path / "run/config.yml").write_text(f"model_name: default\n{kind}\n")
    out = convert.convert(tmp_path / "run", tmp_path / "out")
    np.testing.assert_allclose(torch_logits(out, TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    MAXTEXT_PYTHON is None, reason="MAXTEXT_PYTHON names no interpreter with MaxText"
)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_what_is_written_has_its_logits_in_maxtext(tmp_path: Path, scan_layers: bool) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    options = {"rope_parameters": rope, "max_position_embeddings": 131072} if scan_layers else {}
    model = tiny_model(vocab_size=64, tie_word_embeddings=False, **options)
    model.save_pretrained(tmp_path / "model")
    out = convert.convert(
        tmp_path / "model", tmp_path / "out", to="maxtext", scan_layers=scan_layers
    )
    load = f"load_parameters_path={out / '0/items'}"
    ours = maxtext_logits(TOKENS, tmp_path, str(out / "config.yml"), load)
    expected = torch_logits(tmp_path / "model", TOKENS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)
