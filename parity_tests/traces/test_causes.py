"""The cause of a departure is named, of faults in programs that know nothing of the catalogue."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.faults import planted_backward, planted_jax, planted_torch
from parity_tests.faults.catalogue import FAULTS
from parity_tests.faults.optimizer import faults
from parity_tests.harness.cases import weights_of, write_hf_directory
from parity_tests.harness.mutations import MUTATIONS, mutate
from parity_tests.record_torch import record
from parity_tests.report.mutate import write_case
from parity_tests.traces.check import Verdict, check
from parity_tests.traces.names import section_of, sections, steps_of
from parity_tests.traces.optimizer_step import Moments
from parity_tests.traces.record_checkpoint import record_checkpoint

COMPILED: dict[Any, Any] = {}
JAX_SAMPLE = ("Meta's rows", "fused by groups", "rotated before heads", "sum / 131")
TORCH_SAMPLE = (
    *("yarn beta_slow", "norm bf16", "kv tiled", "residual times 0.22", "mean of means"),
    *("padding seen",),
)
BACKWARD_SAMPLE = (
    ("torch", "tied without head"),
    ("torch", "accumulated twice"),
    ("jax", "embedding overwritten"),
    ("jax", "norms of half the sequence"),
)
KNOWN_MISSES: dict[str, set[str]] = {"jax": {"weights summed in bf16"}, "torch": set()}
STEP_SAMPLE = ("decay_of_norms", "adam_eps_inside_root", "clip_by_value")
Plants = tuple[Any, ...]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints by the names of their configs."""
    folder = tmp_path_factory.mktemp("causes")
    for name, config in planted_torch.CONFIGS.items():
        write_hf_directory(folder / name, config, weights_of(config))
    return folder


def of_jax(directories: Path, out: Path, *plants: Any) -> Verdict:
    trace = planted_jax.record_plants(out, *plants)
    return check(trace, directories / plants[0].of, compiled=COMPILED)


def of_torch(directories: Path, out: Path, *plants: Any) -> Verdict:
    trace = planted_torch.record_plants(out, *plants)
    return check(trace, directories / plants[0].of, compiled=COMPILED)


def assert_named(plant: Any, verdict: Verdict) -> None:
    first = verdict.departures[0]
    assert (first.name, first.direction) == (plant.begins, plant.direction)
    assert verdict.causes is not None
    assert verdict.causes[0].name == plant.fault
    assert verdict.causes[0].after < 1e-2 * verdict.departures[0].rms


BACKWARD: dict[str, tuple[Mapping[str, Any], Callable[..., Verdict]]] = {
    "jax": (planted_backward.JAX, of_jax),
    "torch": (planted_backward.TORCH, of_torch),
}


@pytest.mark.parametrize("name", JAX_SAMPLE)
def test_a_fault_in_jax(name: str, directories: Path, tmp_path: Path) -> None:
    plant = planted_jax.PLANTS[name]
    assert_named(plant, of_jax(directories, tmp_path / "trace", plant))


@pytest.mark.parametrize("name", TORCH_SAMPLE)
def test_a_fault_in_torch(name: str, directories: Path, tmp_path: Path) -> None:
    plant = planted_torch.PLANTS[name]
    assert_named(plant, of_torch(directories, tmp_path / "trace", plant))


@pytest.mark.parametrize(("program", "name"), BACKWARD_SAMPLE)
def test_a_fault_in_the_backward_pass(
    program: str, name: str, directories: Path, tmp_path: Path
) -> None:
    plants, diagnose = BACKWARD[program]
    verdict = diagnose(directories, tmp_path / "trace", plants[name])
    assert_named(plants[name], verdict)
    assert verdict.causes is not None
    assert len(verdict.causes) == 1


def test_both_faults_of_a_pair_are_named(directories: Path, tmp_path: Path) -> None:
    pair = [planted_torch.PLANTS[name] for name in ("theta 500000", "gelu")]
    verdict = of_torch(directories, tmp_path / "trace", *pair)
    assert verdict.causes is not None
    assert [cause.name for cause in verdict.causes] == ["rope_theta", "activation"]


def test_a_fault_that_is_not_in_the_catalogue_is_unknown(directories: Path, tmp_path: Path) -> None:
    plant = planted_torch.Plant(
        "", planted_torch.ACT, change=planted_torch._mlp(lambda g, u: (g.sin() + u) * g)
    )
    verdict = of_torch(directories, tmp_path / "trace", plant)
    assert verdict.causes is not None
    assert [cause.name for cause in verdict.causes] == [None]
    assert verdict.causes[0].departure.name == planted_torch.ACT


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, marks=() if f in STEP_SAMPLE else pytest.mark.slow)
        for f in planted_torch.OPTIMIZER_FAULTS
    ],
)
def test_a_fault_in_an_optimizer(fault: str, directories: Path, tmp_path: Path) -> None:
    trace = planted_torch.record_step(tmp_path / "trace", fault)
    verdict = check(trace, directories / "base", compiled=COMPILED)
    assert verdict.departures[0].direction == "step"
    assert verdict.causes is not None
    assert [cause.name for cause in verdict.causes] == [fault]


def test_steps_that_are_counted_from_the_first_again(directories: Path, tmp_path: Path) -> None:
    """After one earlier step this would be a count that is one too low."""
    trace = planted_torch.record_step(tmp_path / "trace", "adam_step_again", earlier=3)
    verdict = check(trace, directories / "base", compiled=COMPILED)
    assert verdict.causes is not None
    (cause,) = verdict.causes
    assert (cause.name, cause.words) == ("adam_step", "Adam counts from the first step again")


@pytest.mark.parametrize(
    ("kind", "setting", "other"),
    [
        ("Adam", {}, torch.optim.AdamW),
        ("Adam", {"decoupled_weight_decay": False}, torch.optim.AdamW),
        ("Adam", {"decoupled_weight_decay": True}, torch.optim.Adam),
        ("AdamW", {}, torch.optim.Adam),
        ("AdamW", {"decoupled_weight_decay": True}, torch.optim.Adam),
    ],
)
def test_the_wrong_decay_of_an_adam_is_that_of_the_other(
    kind: str, setting: dict[str, bool], other: Any
) -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.5}
    weight, gradient = np.random.default_rng(0).normal(size=(2, 5))
    parameter = torch.nn.Parameter(torch.tensor(weight))
    parameter.grad = torch.tensor(gradient)
    other([parameter], **settings).step()
    (rule,) = (fault.rule for fault in faults() if fault.name == "decay_coupled")
    moments = Moments(np.zeros(5), np.zeros(5))
    wrong = rule.step(kind, settings | setting, 1, weight, gradient, moments)
    np.testing.assert_allclose(wrong, parameter.detach(), rtol=1e-12)


def test_dropout_is_a_cause(directories: Path, tmp_path: Path) -> None:
    model = planted_torch.hf_model(planted_torch.BASE, weights_of(planted_torch.BASE))
    for layer in model.train().model.layers:
        layer.self_attn.attention_dropout = 0.1
    trace = record(model, planted_torch.ids_of(), tmp_path / "trace")
    verdict = check(trace, directories / "base", compiled=COMPILED)
    assert verdict.findings == ["recorded with dropout of 0.1: call model.eval() first"]
    assert verdict.causes is not None
    assert verdict.causes[0].name == "dropout"


def test_a_right_step_has_no_cause(directories: Path, tmp_path: Path) -> None:
    trace = planted_torch.record_step(tmp_path / "trace", None)
    verdict = check(trace, directories / "base", compiled=COMPILED)
    assert (len(verdict.steps), verdict.holds) == (21, True)


def test_a_right_program_has_no_cause(directories: Path, tmp_path: Path) -> None:
    right = planted_torch.Plant("", "", "llama3")
    verdict = of_torch(directories, tmp_path / "trace", right)
    assert (verdict.holds, verdict.causes) == (True, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MUTATIONS if n != "mean_over_all_tokens"])
def test_a_mutation_of_llama_jax(name: str, tmp_path: Path) -> None:
    """But for the one of a loss that recordings of llama_jax do not use."""
    checkpoint, tokens = write_case(tmp_path)
    ids = tmp_path / "tokens.txt"
    ids.write_text(" ".join(map(str, np.load(tokens))))
    with mutate(name):
        record_checkpoint(
            checkpoint,
            tmp_path / "trace",
            program="llama_jax",
            tokens=ids,
            length=64,
            dtype="float32",
            attention="sdpa",
            autocast=None,
            backward=True,
        )
    causes = check(tmp_path / "trace", checkpoint).causes
    assert causes is not None
    assert causes[0].name == MUTATIONS[name].fault


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len(FAULTS) >= 40
    assert {mutation.fault for mutation in MUTATIONS.values()} <= FAULTS.keys()
    assert all(name == fault.name for name, fault in FAULTS.items())
    assert len({fault.words for fault in FAULTS.values()}) == len(FAULTS)


def _order(plant: Any) -> int:
    layers = ["layers.0", "layers.1"]
    assert section_of(plant.begins) in ("embedding", "head", *layers)
    every = [step for section in sections(2) for step in steps_of(section)]
    return every.index(plant.begins)


def _pairs(plants: dict[str, Any], count: int) -> Iterator[tuple[str, Plants]]:
    """Of faults in different steps that do not replace the same function; the first one first."""
    apart = [
        (f"{one} and {other}", tuple(sorted((plants[one], plants[other]), key=_order)))
        for one, other in itertools.combinations(plants, 2)
        if plants[one].begins != plants[other].begins
        and not set(plants[one].functions) & set(plants[other].functions)
        and not (plants[one].inputs and plants[other].inputs)
        and getattr(plants[one], "of", "base") == getattr(plants[other], "of", "base") == "base"
        and getattr(plants[one], "attention", "sdpa") == getattr(plants[other], "attention", "sdpa")
    ]
    yield from random.Random(0).sample(apart, count)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["jax", "torch"])
def test_how_many_are_named_right(program: str, directories: Path, tmp_path: Path) -> None:
    """Every single fault, and a sample of pairs; `pytest -s` prints the table."""
    module, diagnose = {"jax": (planted_jax, of_jax), "torch": (planted_torch, of_torch)}[program]
    plants: dict[str, Any] = dict(module.PLANTS)
    rows = [("single", name, (plant,)) for name, plant in plants.items()]
    rows += [("pair", *pair) for pair in _pairs(plants, 30 if program == "jax" else 100)]
    right: dict[str, list[bool]] = {"module": [], "single": [], "pair": [], "both": []}
    equals = 0
    for index, (kind, name, planted) in enumerate(rows):
        verdict = diagnose(directories, tmp_path / str(index), *planted)
        names = [cause.name for cause in verdict.causes or ()]
        begins = verdict.departures[0].name if verdict.departures else None
        named = bool(names) and names[0] == planted[0].fault
        right[kind].append(named)
        if kind == "single":
            right["module"].append(begins == planted[0].begins)
            equals += bool(verdict.causes and verdict.causes[0].equals)
        else:
            right["both"].append({plant.fault for plant in planted} <= set(names))
        if not named or begins != planted[0].begins:
            print(f"\n{program}: missed: {name}: {begins}, {names}", end="")
    print()
    for kind, results in right.items():
        print(f"{program}, {kind}: {sum(results)} of {len(results)}")
    print(f"{program}: {equals} singles with others that explain as much")

    def share(kind: str) -> float:
        return sum(right[kind]) / len(right[kind])

    assert share("single") >= 0.95
    assert share("module") >= 0.98
    assert share("pair") >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("program", BACKWARD)
def test_how_many_of_the_backward_pass_are_named_right(
    program: str, directories: Path, tmp_path: Path
) -> None:
    """All but the known misses; `pytest -s` prints every miss."""
    plants, diagnose = BACKWARD[program]
    modules, causes, missed = [], [], set()
    for index, (name, plant) in enumerate(plants.items()):
        verdict = diagnose(directories, tmp_path / str(index), plant)
        begins = [(r.name, r.direction) for r in verdict.departures[:1]]
        names = [cause.name for cause in verdict.causes or ()]
        modules.append(begins == [(plant.begins, plant.direction)])
        causes.append(names[:1] == [plant.fault])
        if not (modules[-1] and causes[-1]):
            missed.add(name)
            print(f"\n{program}: missed: {name}: {begins}, {names}", end="")
    print(f"\n{program}, backward: module {sum(modules)}, cause {sum(causes)} of {len(plants)}")
    assert all(modules)
    assert missed == KNOWN_MISSES[program]
