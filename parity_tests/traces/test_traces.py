"""Recordings of programs that are right pass; those of broken ones name the module."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from transformers.models.llama import modeling_llama

from parity_tests import record_torch
from parity_tests.__main__ import main
from parity_tests.harness import independent_llama, independent_torch_llama
from parity_tests.harness.cases import BY_NAME, hf_model, weights_of, write_hf_directory
from parity_tests.record_torch import META, record, recording
from parity_tests.traces.check import Verdict, check
from parity_tests.traces.record_jax import record_jax
from parity_tests.traces.residuals import residual
from parity_tests.traces.trace import open_trace

CASE = BY_NAME["gqa_3_to_1"]
COMPILED: dict[Any, Any] = {}  # what the checks of this file share
DTYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}


def ids_of(seed: int = 0, length: int = 24) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 61, (2, length)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("traces") / "checkpoint"
    write_hf_directory(directory, CASE.config, weights_of(CASE.config))
    return directory


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory, directory: Path) -> Path:
    """A recording of transformers."""
    return record(hugging_face(), ids_of(), tmp_path_factory.mktemp("recorded") / "trace")


def hugging_face(dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    return hf_model(CASE.config, weights_of(CASE.config), attention).to(dtype).eval()


def independent(dtype: torch.dtype = torch.float32) -> Any:
    weights = weights_of(CASE.config)
    return independent_torch_llama.from_hugging_face(CASE.config, weights).to(dtype)


def record_independent(
    out: Path, dtype: Any = jnp.float32, ids: Tensor | None = None, **options: Any
) -> Path:
    """A recording of the independent Llama in JAX."""
    tokens = jnp.asarray((ids_of() if ids is None else ids).numpy(), jnp.int32)
    weights = {name: weight.numpy() for name, weight in weights_of(CASE.config).items()}
    params = independent_llama.params_of(CASE.config, weights, dtype)
    return record_jax(
        lambda params: independent_llama.loss(CASE.config, params, tokens),
        params,
        out,
        inputs={"input_ids": tokens},
        names=independent_llama.names(CASE.config),
        weights=lambda params: independent_llama.to_hugging_face(CASE.config, params),
        **options,
    )


def checked(trace: Path, directory: Path) -> Verdict:
    return check(trace, directory, compiled=COMPILED)


def first(verdict: Verdict) -> tuple[str, str] | None:
    departures = verdict.departures
    return (departures[0].name, departures[0].direction) if departures else None


def test_every_array_of_transformers_is_recorded_and_right(trace: Path, directory: Path) -> None:
    verdict = checked(trace, directory)
    assert verdict.holds
    assert first(verdict) is None
    # 15 values of each layer; embedding, cos, sin, norm, logits, loss
    assert len(verdict.values) == 2 * 15 + 6
    # as many gradients but for cos, sin and the loss, and of 9 parameters of each layer, and of 3 others
    assert len(verdict.gradients) == 2 * 15 + 3 + 2 * 9 + 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_left_is_right_in_either_convention(
    attention: str, directory: Path, tmp_path: Path
) -> None:
    """Queries before the text see no key: eager attention returns the mean of all values, sdpa zero."""
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :7] = 0
    model = hugging_face(attention=attention)
    verdict = checked(record(model, ids_of(), tmp_path / "trace", attention_mask=mask), directory)
    assert verdict.holds
    assert bool(verdict.notes) == (attention == "eager")
    assert all("see no key" in note for note in verdict.notes)


@pytest.mark.parametrize("items", [77, torch.tensor(77)])
def test_the_number_of_items_of_a_batch_is_recorded(
    items: Any, directory: Path, tmp_path: Path
) -> None:
    trace = record(hugging_face(), ids_of(), tmp_path / "trace", num_items_in_batch=items)
    assert checked(trace, directory).holds
    model = hugging_face()
    with recording(model, tmp_path / "own") as recorder:
        logits = model(ids_of()).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, ids_of()[:, 1:].flatten(), reduction="sum") / 77
        recorder.loss(loss, labels=ids_of(), num_items=77)
        loss.backward()
    assert checked(tmp_path / "own", directory).holds


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_of_queries_and_keys(attention: str, directory: Path, tmp_path: Path) -> None:
    """Documents in a row, one of which is followed by padding."""
    segments = torch.tensor([[0] * 9 + [1] * 15, [0] * 4 + [1] * 13 + [2] * 7])
    shown = torch.ones(2, 24, dtype=torch.bool)
    shown[0, 20:] = False
    sees = (segments[:, :, None] == segments[:, None]).tril() & shown[:, None]
    mask = sees[:, None]
    if attention == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    trace = record(
        hugging_face(attention=attention), ids_of(), tmp_path / "trace", attention_mask=mask
    )
    inputs = open_trace(trace).inputs()
    np.testing.assert_array_equal(inputs["attention_mask"], shown)
    np.testing.assert_array_equal(inputs["segment_ids"][shown], segments[shown])
    assert checked(trace, directory).holds


@pytest.mark.parametrize("ids", [ids_of(length=2), torch.full((2, 24), 7)])
def test_gradients_of_queries_that_cancel(ids: Tensor, directory: Path, tmp_path: Path) -> None:
    """Where a query sees one value, or the same everywhere, its exact gradient is 0."""
    assert checked(record(hugging_face(), ids, tmp_path / "trace"), directory).holds


def test_weights_that_are_rounded(directory: Path, tmp_path: Path) -> None:
    model = hugging_face(torch.bfloat16).float()
    verdict = checked(record(model, ids_of(), tmp_path / "trace"), directory)
    assert verdict.causes is not None
    assert verdict.causes[0].words == "weights are rounded to bfloat16"


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_other_programs_that_are_right(dtype: torch.dtype, directory: Path, tmp_path: Path) -> None:
    traces = [
        record(independent(dtype), ids_of(), tmp_path / "torch", heads=(6, 2, 8)),
        record_independent(tmp_path / "jax", DTYPES[dtype]),
    ]
    if dtype == torch.bfloat16:
        traces.append(record(hugging_face(dtype), ids_of(), tmp_path / "transformers"))
    for trace in traces:
        verdict = checked(trace, directory)
        assert first(verdict) is None
        assert verdict.holds, verdict.findings


class FusedAttention(independent_torch_llama.Attention):
    """Queries, keys and values are one projection."""

    def __init__(self, separate: independent_torch_llama.Attention) -> None:
        super().__init__(CASE.config)
        parts = [projection.weight for projection in (separate.wq, separate.wk, separate.wv)]
        self.wqkv = torch.nn.Linear(48, sum(map(len, parts)), bias=False)
        self.wqkv.weight = torch.nn.Parameter(torch.cat(parts))
        self.wo = separate.wo
        del self.wq, self.wk, self.wv

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wqkv(x).split((48, 16, 16), dim=-1)
        projections: dict[str, Any] = {"wq": q, "wk": k, "wv": v}
        for name, part in projections.items():
            setattr(self, name, lambda _, part=part: part)
        return super().forward(x)


_ATTENTION = "model.layers.{layer}.self_attn"
QKV = f"{_ATTENTION}.q_proj:pairs", f"{_ATTENTION}.k_proj:pairs", f"{_ATTENTION}.v_proj"


def fused() -> tuple[Any, dict[str, str | tuple[str, ...]]]:
    """A model with fused projections, and the map of its names."""
    model = independent()
    for layer in model.layers:
        layer.attention = FusedAttention(layer.attention)
    names = {key: value for key, value in META.items() if not key.endswith((".wq", ".wk", ".wv"))}
    return model, names | {"layers.{layer}.attention.wqkv": QKV}


def test_a_fused_projection_by_a_map_of_names(directory: Path, tmp_path: Path) -> None:
    model, names = fused()
    trace = record(model, ids_of(), tmp_path / "trace", names=names, heads=(6, 2, 8))
    verdict = checked(trace, directory)
    assert first(verdict) is None
    assert verdict.holds, verdict.findings
    assert len(verdict.values) == 2 * 15 + 4
    assert len(verdict.gradients) == 2 * 15 + 3 + 2 * 9 + 3
    swapped = names | {"layers.{layer}.attention.wqkv": (QKV[0], QKV[2], QKV[1])}
    trace = record(model, ids_of(), tmp_path / "swapped", names=swapped, heads=(6, 2, 8))
    assert first(checked(trace, directory)) == ("layers.0.self_attn.k_proj", "forward")


def test_the_recorder_alone(directory: Path, tmp_path: Path) -> None:
    """Copied to a folder of its own, as a program."""
    script = shutil.copy(record_torch.__file__, tmp_path)
    (tmp_path / "tokens.txt").write_text(" ".join(map(str, range(2, 34))))
    options = "--tokens", "tokens.txt", "--out", "trace", "--attention", "eager"
    done = subprocess.run(
        [sys.executable, script, directory, *options, "--forward-only"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    verdict = checked(tmp_path / "trace", directory)
    assert verdict.holds
    assert (verdict.shape, len(verdict.gradients)) == ((1, 32), 0)


@pytest.mark.slow
def test_recordings_of_less_are_checked_from_what_there_is(directory: Path, tmp_path: Path) -> None:
    tokens = jnp.asarray(ids_of().numpy(), jnp.int32)
    weights = {name: weight.numpy() for name, weight in weights_of(CASE.config).items()}
    params = independent_llama.params_of(CASE.config, weights, jnp.float32)
    names = independent_llama.names(CASE.config)
    verdicts = []
    for eps in (CASE.config["rms_norm_eps"], 1e-3):
        config = CASE.config | {"rms_norm_eps": eps}
        trace = record_jax(
            partial(lambda config, params: independent_llama.loss(config, params, tokens), config),
            params,
            tmp_path / str(eps),
            inputs={"input_ids": tokens},
            names={name: names[name] for name in ("block{layer}.mixed", "logits")},
            weights=lambda params: independent_llama.to_hugging_face(CASE.config, params),
        )
        verdicts.append(checked(trace, directory))
    assert verdicts[0].holds
    assert first(verdicts[1]) == ("layers.0.self_attn.attention", "forward")


@contextlib.contextmanager
def rotated_by_one_more() -> Iterator[None]:
    right = modeling_llama.apply_rotary_pos_emb

    def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        return right(q, k, cos.roll(1, 1), sin.roll(1, 1), **options)

    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", wrong):
        yield


def test_a_fault_in_torch_is_named(directory: Path, tmp_path: Path) -> None:
    model = hugging_face()
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    verdict = checked(record(model, ids_of(), tmp_path / "gelu"), directory)
    assert first(verdict) == ("layers.1.mlp.act", "forward")
    # nothing else is wrong: what follows is computed from what was recorded
    assert {r.name for r in verdict.departures if r.direction == "forward"} == {"layers.1.mlp.act"}

    with rotated_by_one_more():
        trace = record(hugging_face(), ids_of(), tmp_path / "rotated")
    verdict = checked(trace, directory)
    assert first(verdict) == ("layers.0.self_attn.rotate.q", "forward")

    model = hugging_face()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[2] *= 1.001
    verdict = checked(record(model, ids_of(), tmp_path / "weight"), directory)
    assert verdict.findings == [
        "weights that are not the checkpoint's: model.layers.0.self_attn.v_proj.weight"
    ]
    departure = verdict.departures[0]
    assert (departure.name, departure.heads) == ("layers.0.self_attn.v_proj", (0,))


def test_a_fault_in_jax_is_named(directory: Path, tmp_path: Path) -> None:
    right = independent_llama.mix

    def sees_the_future(q: jax.Array, *others: jax.Array) -> jax.Array:
        late, mixed = jnp.arange(q.shape[1])[None, :, None, None] >= 20, right(q, *others)
        return jnp.where(late, jnp.mean(mixed, axis=1, keepdims=True), mixed)

    with mock.patch.object(independent_llama, "mix", sees_the_future):
        trace = record_independent(tmp_path / "trace")
    pages = tmp_path / "check.json", tmp_path / "check.html"
    assert (
        main(
            [
                "check",
                str(trace),
                "--model",
                str(directory),
                "--json",
                str(pages[0]),
                "--html",
                str(pages[1]),
            ]
        )
        == 1
    )
    found = json.loads(pages[0].read_text())["first_to_depart"]
    assert (found["name"], found["direction"]) == ("layers.0.self_attn.attention", "forward")
    assert (found["row"], found["position"]) == (0, 20)
    assert "departs first: layers.0.self_attn.attention" in pages[1].read_text()
    assert pages[1].read_text().count("data:image/png;base64,") == 3


def test_a_fault_in_the_backward_pass_is_named(directory: Path, tmp_path: Path) -> None:
    @jax.custom_vjp
    def rotate(x: jax.Array, turned_by: jax.Array) -> jax.Array:
        return independent_llama_rotate(x, turned_by)

    independent_llama_rotate = independent_llama.rotate
    rotate.defvjp(
        lambda x, turned_by: (independent_llama_rotate(x, turned_by), turned_by),
        lambda turned_by, g: (independent_llama_rotate(g, turned_by), jnp.zeros_like(turned_by)),
    )  # the transpose turns the other way
    with mock.patch.object(independent_llama, "rotate", rotate):
        trace = record_independent(tmp_path / "trace")
    verdict = checked(trace, directory)
    assert first(verdict) == ("layers.1.self_attn.k_proj", "backward")


class Tf32(TorchFunctionMode):
    """Operands of matmuls have 10 bits of mantissa, as on a GPU."""

    operands: ClassVar = {
        torch.nn.functional.linear: 2,
        torch.nn.functional.scaled_dot_product_attention: 3,
        torch.matmul: 2,
    }

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        count = self.operands.get(function, 0)
        arguments = [*map(_rounded, arguments[:count]), *arguments[count:]]
        return function(*arguments, **(options or {}))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        bits = gradient.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _rounded(x: Tensor) -> Tensor:
    return _Round.apply(x)


@pytest.mark.slow
def test_precision_decides_what_is_allowed(directory: Path, tmp_path: Path) -> None:
    with Tf32():
        trace = record(hugging_face(), ids_of(), tmp_path / "tf32", settings={"matmul": "tf32"})
    assert checked(trace, directory).holds
    manifest = json.loads((trace / "manifest.json").read_text())
    manifest["precision"]["matmul"] = "float32"
    (trace / "manifest.json").write_text(json.dumps(manifest))
    assert first(checked(trace, directory)) == ("layers.0.self_attn.q_proj", "forward")

    with torch.autocast("cpu", torch.bfloat16):
        trace = record(hugging_face(), ids_of(), tmp_path / "autocast")
    verdict = checked(trace, directory)
    assert verdict.precision == "float32, matmuls in bfloat16 (autocast)"
    assert verdict.holds


@pytest.mark.parametrize("fault", [None, "decay", "bias correction"])
def test_an_optimizer_step(fault: str | None, directory: Path, tmp_path: Path) -> None:
    model = hugging_face()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    ids = ids_of()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # so that there are moments before the recorded step
    optimizer.zero_grad()
    with torch.no_grad():  # the checkpoint's weights again
        for name, weight in weights_of(CASE.config).items():
            model.get_parameter(name).copy_(weight)
    with recording(model, tmp_path / "trace") as trace:
        loss = model(input_ids=ids, labels=ids).loss
        trace.loss(loss, labels=ids)
        loss.backward()
        trace.step(optimizer, max_norm=0.5)
    manifest = json.loads((tmp_path / "trace" / "manifest.json").read_text())
    if fault == "decay":
        manifest["optimizer"]["groups"][0]["weight_decay"] = 0.0
    if fault == "bias correction":
        manifest["optimizer"]["step"] = 0
    (tmp_path / "trace" / "manifest.json").write_text(json.dumps(manifest))
    verdict = checked(tmp_path / "trace", directory)
    assert len(verdict.steps) == 2 * 9 + 3
    assert verdict.holds == (fault is None)
    if fault is not None:
        assert verdict.departures[0].direction == "step"


def record_step(out: Path, model: Any, optimizer: Any, **options: Any) -> Path:
    ids = ids_of()
    with recording(model, out, **options) as trace:
        output = model(ids)
        logits = output if isinstance(output, Tensor) else output.logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        trace.loss(loss, labels=ids)
        loss.backward()
        trace.step(optimizer, max_norm=0.5)
    return out


def test_the_step_of_a_fused_projection_is_checked_in_all_its_parts(
    directory: Path, tmp_path: Path
) -> None:
    model, names = fused()
    rate, betas = torch.tensor(1e-3), (torch.tensor(0.9), torch.tensor(0.95))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.1)
    trace = record_step(tmp_path / "trace", model, optimizer, names=names, heads=(6, 2, 8))
    verdict = checked(trace, directory)
    assert len(verdict.steps) == 2 * 9 + 3
    assert verdict.holds
    one = "model.layers.1.self_attn.k_proj.weight"
    path = trace / open_trace(trace).stored[f"{one}.stepped"].path.name
    tensors = load_file(path)
    tensors[f"{one}.stepped"][3] += 1e-3
    save_file(tensors, path)
    assert [r.name for r in checked(trace, directory).departures] == [one]


@pytest.mark.parametrize(
    ("setting", "optimizer"),
    [
        ("nesterov", partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
        ("dampening", partial(torch.optim.SGD, momentum=0.9, dampening=0.5)),
        ("maximize", partial(torch.optim.SGD, maximize=True)),
        ("amsgrad", partial(torch.optim.AdamW, amsgrad=True)),
    ],
)
def test_a_step_that_cannot_be_checked_is_an_error(
    setting: str, optimizer: Any, directory: Path, tmp_path: Path
) -> None:
    model = hugging_face()
    trace = record_step(tmp_path / "trace", model, optimizer(model.parameters(), lr=1e-3))
    with pytest.raises(ValueError, match=f"optimizer: {setting}: steps with it cannot be checked"):
        checked(trace, directory)


def test_two_recordings(trace: Path, directory: Path, tmp_path: Path, capsys: Any) -> None:
    right = record(independent(), ids_of(), tmp_path / "right", heads=(6, 2, 8))
    assert main(["check", str(trace), str(right)]) == 0
    model = independent()
    with torch.no_grad():
        model.layers[1].ffn_norm.weight *= 1.01
    wrong = record(model, ids_of(), tmp_path / "wrong", heads=(6, 2, 8))
    assert main(["check", str(trace), str(wrong), "--json", str(tmp_path / "numbers.json")]) == 1
    assert "numbers.json" in "".join(capsys.readouterr().out.split("wrote ")[1:])
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["first_to_depart"] == "model.layers.1.post_attention_layernorm.output"
    assert numbers["findings"] == [
        "weights that differ: model.layers.1.post_attention_layernorm.weight"
    ]
    other = record(independent(), ids_of(1), tmp_path / "other", heads=(6, 2, 8))
    assert main(["check", str(trace), str(other)]) == 2
    assert "input_ids: not those of" in capsys.readouterr().err


def test_a_recording_is_as_large_as_was_told_and_in_files_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = open_trace(record(hugging_face(), ids_of(length=60), tmp_path / "trace"))
    told = re.fullmatch(r"recording about ([\d.]+) MB into .*\n", capsys.readouterr().err)
    assert told is not None
    written = sum(stored.nbytes for stored in trace.stored.values()) / 1e6
    assert float(told[1]) == pytest.approx(written, rel=0.05)
    files = {stored.path.name.partition("-")[2] for stored in trace.stored.values()}
    assert files == {f"{n}.safetensors" for n in ("embedding", "layers.0", "layers.1", "head")}


def test_infinities_depart() -> None:
    """A fault that is put into the oracle can overflow; warnings are errors here."""
    infinite = np.full((2, 3), np.inf)
    found = residual("x", "forward", np.ones((2, 3)), infinite, infinite, eps=1e-7, rows=2)
    assert found.departs
    assert not np.isfinite(found.rms)
