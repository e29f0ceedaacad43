"""Options: TOML and flags are equivalent; ranges; which options may change on resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.numerics.remat_policy import Kept
from train.flags import parse_options
from train.option_checks import validate
from train.options import GuardOptions, ModelOptions, Optimizer, OptimizerOptions, RunOptions
from train.options_toml import flags_of, to_toml
from train.plan.command import run_plan
from train.run.changes import FREE_ON_RESUME, fixed_options_changed

TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(
    lambda text: not text.startswith("-") and text != "None"
)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-5, 1 << 40),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: TEXT,
    Path: TEXT.filter(lambda text: "\0" not in text).map(Path),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{f.name: values(hints[f.name]) for f in dataclasses.fields(hint)})
    if hint in LEAVES:
        return LEAVES[hint]
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), min_size=1, max_size=3).map(tuple)
    types = [option for option in get_args(hint) if option is not type(None)]
    if str(get_origin(hint)) == "typing.Literal":
        return st.sampled_from(types)
    return st.one_of(st.none(), *(values(option) for option in types))


def read(text: str, path: Path) -> RunOptions:
    path.write_text(text, "utf-8")
    return parse_options(RunOptions(), flags_of(path), path)


@settings(max_examples=50, deadline=None)
@given(options=values(RunOptions))
def test_options_survive_toml_and_flags(
    options: RunOptions, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    assert read(to_toml(options), path) == options


def test_no_clipping_in_toml(tmp_path: Path) -> None:
    """None, where it is not the default."""
    optimizer = dataclasses.replace(RunOptions().optimizer, clip_norm=None)
    options = dataclasses.replace(RunOptions(), optimizer=optimizer)
    assert read(to_toml(options), tmp_path / "a.toml").optimizer.clip_norm is None


def test_no_clipping_on_the_command_line() -> None:
    flags = ["--optimizer.clip-norm", "None"]
    assert parse_options(RunOptions(), flags, Path("x")).optimizer.clip_norm is None


def test_defaults_and_other_spellings(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    assert read("", path) == RunOptions()
    assert read(to_toml(RunOptions()), path) == RunOptions()
    expected = dataclasses.replace(RunOptions(), batch_size=4)
    assert read("batch-size = 4", path) == read("batch_size = 4", path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 4", "found step, expected one of out, data, steps"),
        ("[optimizer]\nrate = 4", "found optimizer.rate, expected one of name, learning_rate"),
        ("optimizer = 3", "found optimizer = 3, expected a table"),
        ("steps = ", "not valid TOML ("),
    ],
)
def test_errors_in_toml(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        flags_of(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def leaves(options: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = prefix + field.name
        names += leaves(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return names


def changed(options: Any, name: str) -> Any:
    first, _, rest = name.partition(".")
    value = changed(getattr(options, first), rest) if rest else "something else"
    return dataclasses.replace(options, **{first: value})


@pytest.mark.parametrize("name", leaves(RunOptions()))
def test_which_options_may_change_on_resume(name: str) -> None:
    free = any(name == prefix or name.startswith(prefix + ".") for prefix in FREE_ON_RESUME)
    changes = fixed_options_changed(RunOptions(), changed(RunOptions(), name))
    if free:
        assert changes == []
    else:
        (message,) = changes
        assert message.startswith(f"{name.replace('_', '-')}: found something else, expected ")


def test_no_change() -> None:
    assert fixed_options_changed(RunOptions(), RunOptions()) == []
    validate(RunOptions())


def options_with(name: str, value: Any) -> RunOptions:
    """The defaults except for one option, and for the schedule that uses it."""
    users: dict[str, dict[str, Any]] = {"decay_fraction": {"schedule": "wsd"}}
    users |= {name: {"action": "skip"} for name in vars(GuardOptions())}
    part, _, field = name.rpartition(".")
    options = RunOptions()
    if not part:
        return dataclasses.replace(options, **{field: value})
    changes = users.get(field, {}) | {field: value}
    return dataclasses.replace(
        options, **{part: dataclasses.replace(getattr(options, part), **changes)}
    )


NOT_NEGATIVE = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.z_loss",
    "evaluation.sample_temperature",
)
POSITIVE = ("optimizer.eps", "optimizer.clip_norm", "log.peak_flops")
SIGMAS = ("guard.loss_sigma", "guard.norm_sigma", "guard.update_sigma")
BETWEEN = ("average.decay",)
BETAS = ("optimizer.beta1", "optimizer.beta2")
FRACTIONS = ("optimizer.final_fraction", "optimizer.decay_fraction")


def test_every_number_has_a_range() -> None:
    """Except those checked where they are used: the mesh against devices, the seed by the data."""
    hints = {"": RunOptions, **{f"{name}.": type(getattr(RunOptions(), name)) for name in (
        "model", "optimizer", "guard", "average", "mesh", "distributed", "checkpoint", "evaluation",
        "log")}}  # fmt: skip
    floats = {
        prefix + name
        for prefix, kind in hints.items()
        for name, hint in get_type_hints(kind).items()
        if hint is float or float in get_args(hint)
    }
    assert floats == {*NOT_NEGATIVE, *POSITIVE, *BETAS, *FRACTIONS, *SIGMAS, *BETWEEN}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0, -1e-9])
@pytest.mark.parametrize("name", [*NOT_NEGATIVE, *POSITIVE, *BETAS, *FRACTIONS, *SIGMAS, *BETWEEN])
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError) as caught:
        validate(options_with(name, value))
    assert str(caught.value).startswith(f"{name.replace('_', '-')}: found {value}, expected ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        # 1e-46 is 0 in float32, and 1 - 1e-9 is 1
        *((name, (0.0, 1e-46), (1e-30, 1.0)) for name in POSITIVE),
        *((name, (1.0, 1 - 1e-9), (0.0, 0.999999)) for name in BETAS),
        *((name, (1e39,), (0.0, 1e3)) for name in NOT_NEGATIVE),
        *((name, (0.0, 1e39), (0.1, 6.0)) for name in SIGMAS),
        ("guard.window", (1, 0, -1), (2, 1000)),
        ("guard.non_finite", (-1,), (0, 5)),
        ("average.decay", (0.0, 1.0), (1e-3, 0.999999999)),
        ("optimizer.final_fraction", (1.1,), (0.0, 1.0)),
        ("optimizer.decay_fraction", (0.0, 1.1), (0.01, 0.9)),
        ("optimizer.warmup_steps", (-1, 300), (0, 299)),
        *((name, (0, -1), (1,)) for name in (
            "steps", "batch_size", "sequence_length", "micro_batches", "model.scan_unroll",
            "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "distributed.processes",
        )),
        *((name, (-1,), (0, 1)) for name in (
            "export_every", "evaluation.every", "evaluation.batches", "evaluation.sample_tokens",
            "distributed.process_id",
        )),
    ],
)  # fmt: skip
def test_ends_of_ranges(name: str, wrong: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    for value in wrong:
        with pytest.raises(ValueError) as caught:
            validate(options_with(name, value))
        assert str(caught.value).startswith(f"{name.replace('_', '-')}: found {value}, "), value
    for value in right:
        validate(options_with(name, value))


def test_the_range_of_eps_is_that_of_the_parameters_dtype() -> None:
    options = options_with("optimizer.eps", 1e-100)
    with pytest.raises(
        ValueError, match=r"optimizer\.eps: found 1e-100, expected a finite number above 0"
    ):
        validate(options)
    model = dataclasses.replace(options.model, parameter_dtype="float64")
    validate(dataclasses.replace(options, model=model))


@pytest.mark.parametrize(
    ("user", "name", "value"),
    [
        ("lion", "eps", 0.5),
        *(("sgd", name, 0.5) for name in ("beta2", "eps")),
        *(("adafactor", name, 0.5) for name in ("beta1", "beta2", "eps")),
        *((schedule, "decay_fraction", 0.5) for schedule in ("cosine", "linear", "constant")),
        ("constant", "final_fraction", 0.5),
    ],
)
def test_an_option_that_is_not_used(user: str, name: str, value: float) -> None:
    kind = "name" if user in get_args(Optimizer) else "schedule"
    default = getattr(OptimizerOptions(), name)
    options = OptimizerOptions(**{kind: user, name: value})
    with pytest.raises(ValueError) as caught:
        validate(RunOptions(optimizer=options))
    flag = f"optimizer.{name.replace('_', '-')}"
    assert str(caught.value) == (
        f"{flag}: found 0.5, but {user} does not use it: leave it out, or at {default}"
    )
    validate(RunOptions(optimizer=dataclasses.replace(options, **{name: default})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"remat": "dots", "remat_save": ("gate", "up")},
            "model.remat-save: found gate up with --model.remat dots, expected --model.remat full, which "
            "keeps nothing else",
        ),
        (
            {"remat": "none", "remat_offload": ("input",)},
            "model.remat-offload: found input with --model.remat none, expected --model.remat full, which "
            "keeps nothing else",
        ),
        (
            {"remat": "full", "remat_save": ("gate",), "remat_offload": ("input", "gate")},
            "model.remat-offload: found gate, which model.remat-save has as well: leave it out of one",
        ),
    ],
)
def test_names_of_kept_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        validate(RunOptions(model=ModelOptions(**options)))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"mup_base_heads": 2}, "model.mup-base-heads: found 2 with --model.parametrization standard"),
        ({"mup_zero_head": True}, "model.mup-zero-head: found True with --model.parametrization standard"),
        ({"mup_base_hidden_size": 0}, "model.mup-base-hidden-size: found 0, expected at least 1"),
        ({"width": 0}, "model.width: found 0, expected at least 1"),
        ({"width": 64, "init_from": Path("x")}, "model.width: found 64 with the weights of x, which"),
    ],
)  # fmt: skip
def test_widths_and_parametrizations(model: dict[str, Any], message: str) -> None:
    if "mup_base_hidden_size" in model:
        model |= {"parametrization": "mup"}
    with pytest.raises(ValueError) as caught:
        validate(RunOptions(model=ModelOptions(**model)))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_optimizers_that_mup_has_rules_for(name: Optimizer) -> None:
    model = ModelOptions(parametrization="mup", mup_base_hidden_size=64)
    options = RunOptions(model=model, optimizer=OptimizerOptions(name=name))
    if name in ("adamw", "muon"):
        validate(options)
    else:
        with pytest.raises(ValueError, match=f"optimizer.name: found {name} with --model.param"):
            validate(options)


def test_the_remat_policy_of_the_options() -> None:
    assert ModelOptions(remat="full").remat_policy == "full"
    named = ModelOptions(remat="full", remat_save=("gate",), remat_offload=("input",))
    validate(RunOptions(model=named))
    assert named.remat_policy == Kept(("gate",), ("input",))


@pytest.mark.parametrize("name", ["parameter_dtype", "compute_dtype"])
def test_float16_is_not_for_training(name: str, tmp_path: Path) -> None:
    """By flag, from TOML and in a plan; the other dtypes are accepted."""
    flag = name.replace("_", "-")
    message = f"^model.{flag}: found float16, expected bfloat16, float32 or float64: "
    options = options_with(f"model.{name}", "float16")
    for refused in (options, read(to_toml(options), tmp_path / "a.toml")):
        with pytest.raises(ValueError, match=message):
            validate(refused)
    with pytest.raises(ValueError, match=message):
        run_plan(options, topology=None, host_devices=1, limit=None, json_file=None)
    for dtype in ("float32", "bfloat16", "float64"):
        validate(options_with(f"model.{name}", dtype))


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({"window": 9}, "guard.window: found 9 with no --guard.action, which does not use it"),
        ({"update_sigma": 3.0}, "guard.update-sigma: found 3.0 with no --guard.action, which"),
        (
            {"action": "clip", "loss_sigma": 3.0},
            "guard.loss-sigma: found 3.0 with --guard.action clip,",
        ),
        (
            {"action": "clip-layers", "norm_sigma": None},
            "guard.norm-sigma: found None with --guard.action",
        ),
        (
            {"action": "skip", "norm_sigma": None, "loss_sigma": None},
            "guard.norm-sigma: found None with --guard.action skip, which then has nothing to judge",
        ),
    ],
)
def test_a_guard_that_does_not_use_an_option(guard: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        validate(RunOptions(guard=GuardOptions(**guard)))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_guards_that_fit() -> None:
    validate(RunOptions(guard=GuardOptions(non_finite=3)))
    validate(RunOptions(guard=GuardOptions("skip", norm_sigma=None)))
    validate(RunOptions(guard=GuardOptions("clip", window=32, norm_sigma=3.0, non_finite=1)))
