"""Names, fused projections and wrappers of models in torch, as other programs have them."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from parity_tests.harness import independent_torch_llama
from parity_tests.harness.cases import BY_NAME, hf_model, weights_of, write_hf_directory
from parity_tests.harness.child_process import ROOT
from parity_tests.record_torch import KNOWN, record
from parity_tests.traces.check import Verdict, check

CASE = BY_NAME["gqa_3_to_1"]  # 6 query heads, 2 key/value heads, of 8 features
COMPILED: dict[Any, Any] = {}
IDS = torch.arange(2, 26)[None]
GRADIENTS = 2 * 15 + 3 + 2 * 9 + 3  # of 15 values and 9 parameters a layer, and of 3 others each


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torch_models") / "checkpoint"
    write_hf_directory(directory, CASE.config, weights_of(CASE.config))
    return directory


def checked(trace: Path, directory: Path) -> Verdict:
    return check(trace, directory, compiled=COMPILED)


def meta_model() -> Any:
    return independent_torch_llama.from_hugging_face(CASE.config, weights_of(CASE.config))


class Separate(nn.Module):
    """torchtitan's `QKVLinear`."""

    def __init__(self, attention: independent_torch_llama.Attention) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = attention.wq, attention.wk, attention.wv

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.wq(x), self.wk(x), self.wv(x)


class Grouped(nn.Module):
    """torchtitan's `FusedQKVLinear`: of each key/value head, 3 query heads, the key and the value."""

    def __init__(self, attention: independent_torch_llama.Attention) -> None:
        super().__init__()
        rows = [
            part.weight.detach().unflatten(0, (2, -1))
            for part in (attention.wq, attention.wk, attention.wv)
        ]
        self.wqkv = nn.Linear(48, 80, bias=False)
        self.wqkv.weight = nn.Parameter(torch.cat(rows, dim=1).flatten(0, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.wqkv(x).unflatten(-1, (2, -1)).split((24, 8, 8), dim=-1)
        return tuple(part.flatten(-2) for part in parts)


class TitanAttention(independent_torch_llama.Attention):
    def __init__(self, attention: Any, projections: type[nn.Module]) -> None:
        super().__init__(CASE.config)
        del self.wq, self.wk, self.wv
        self.qkv_linear, self.wo = projections(attention), attention.wo

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv_linear(x)
        for name, part in zip(("wq", "wk", "wv"), parts, strict=True):
            setattr(self, name, lambda _, part=part: part)
        return super().forward(x)


class Titan(nn.Module):
    """torchtitan 0.3's names: `lm_head`, and the projections in `qkv_linear`."""

    def __init__(self, projections: type[nn.Module]) -> None:
        super().__init__()
        model = meta_model()
        for layer in model.layers:
            layer.attention = TitanAttention(layer.attention, projections)
        self.tok_embeddings, self.layers = model.tok_embeddings, model.layers
        self.norm, self.lm_head = model.norm, model.output

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


@pytest.mark.parametrize("projections", [Separate, Grouped])
def test_torchtitan(projections: type[nn.Module], directory: Path, tmp_path: Path) -> None:
    model = Titan(projections)
    verdict = checked(record(model, IDS, tmp_path / "trace", heads=(6, 2, 8)), directory)
    assert verdict.holds, verdict.findings
    assert len(verdict.gradients) == GRADIENTS


def test_heads_from_metas_and_torchtitans_arguments(directory: Path, tmp_path: Path) -> None:
    model = meta_model()
    model.params = SimpleNamespace(dim=48, n_heads=6, n_kv_heads=2)
    assert checked(record(model, IDS, tmp_path / "trace"), directory).holds


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ("q_proj:pairs:group", "k_proj:pairs", "v_proj"),
            "names: ':group' in 'model.layers.0.self_attn.q_proj:pairs:group', expected ':pairs' or "
            "':groups'",
        ),
        (
            ("q_proj:pairs", "k_proj:pear", "v_proj"),
            "names: ':pear' in 'model.layers.0.self_attn.k_proj:pear', expected ':pairs' or ':groups'",
        ),
        (
            ("q_proj:groups",),
            "names: ':groups' in model.layers.0.self_attn.q_proj:groups; expected it at all of q_proj, "
            "k_proj, v_proj",
        ),
        (
            ("q_proj:groups", "k_proj:groups", "v_proj"),
            "names: ':groups' in model.layers.0.self_attn.q_proj:groups, "
            "model.layers.0.self_attn.k_proj:groups, model.layers.0.self_attn.v_proj; expected it at all "
            "of q_proj, k_proj, v_proj",
        ),
    ],
)
def test_wrong_marks(parts: tuple[str, ...], message: str, tmp_path: Path) -> None:
    titan = KNOWN["torchtitan with fused projections"]
    fused = "layers.{layer}.attention.qkv_linear.wqkv"
    names = {**titan, fused: tuple(f"model.layers.{{layer}}.self_attn.{part}" for part in parts)}
    with pytest.raises(ValueError) as error:
        record(Titan(Grouped), IDS, tmp_path / "trace", names=names, heads=(6, 2, 8))
    assert str(error.value) == message


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def recomputed(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    return model


class Parallel(nn.Module):
    """What DDP does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)


def compiled_around_parallel(model: Any) -> Any:
    return compiled(Parallel(model))


@pytest.mark.parametrize(
    "wrap", [compiled, compiled_layers, recomputed, Parallel, compiled_around_parallel]
)
def test_wrappers(wrap: Any, directory: Path, tmp_path: Path) -> None:
    model = wrap(hf_model(CASE.config, weights_of(CASE.config)).eval())
    verdict = checked(record(model, IDS, tmp_path / "trace"), directory)
    assert verdict.holds, verdict.findings
    assert len(verdict.gradients) == GRADIENTS


def test_sharded_by_fsdp(directory: Path, tmp_path: Path) -> None:
    """Over two processes, with the optimizer's step."""
    command = [sys.executable, "-m", "parity_tests.workers.fsdp_trace"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), tmp_path / "store", tmp_path / "trace"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    verdict = checked(tmp_path / "trace-1", directory)
    assert verdict.holds, verdict.findings
    assert len(verdict.gradients) == GRADIENTS
    assert len(verdict.steps) == 2 * 9 + 3
