"""Options: TOML and flags say the same, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import tyro
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from train.config import (
    FREE_ON_RESUME,
    RunOptions,
    differences,
    flags_of,
    to_toml,
    validate,
)

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
    kinds = [each for each in get_args(hint) if each is not type(None)]
    if str(get_origin(hint)) == "typing.Literal":
        return st.sampled_from(kinds)
    return st.one_of(st.none(), *(values(each) for each in kinds))


def read(text: str, path: Path) -> RunOptions:
    path.write_text(text, "utf-8")
    return tyro.cli(RunOptions, args=flags_of(path))


# no shrinking: every example is parsed by tyro anew, which takes its time
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(options=values(RunOptions))
def test_options_survive_toml_and_flags(
    options: RunOptions, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    assert read(to_toml(options), path) == options


def test_no_clip_stays_no_clip(tmp_path: Path) -> None:
    """None where it is not the default."""
    optimizer = dataclasses.replace(RunOptions().optimizer, clip_norm=None)
    options = dataclasses.replace(RunOptions(), optimizer=optimizer)
    assert read(to_toml(options), tmp_path / "a.toml").optimizer.clip_norm is None


def test_defaults_and_other_spellings(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    assert read("", path) == RunOptions()
    assert read(to_toml(RunOptions()), path) == RunOptions()
    wanted = dataclasses.replace(RunOptions(), batch_size=4)
    assert read("batch-size = 4", path) == read("batch_size = 4", path) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 4", "found step, expected one of out, data, steps"),
        ("[optimizer]\nrate = 4", "found optimizer.rate, expected one of name, learning_rate"),
        ("optimizer = 3", "found optimizer = 3, expected a table"),
        ("steps = ", "is not TOML ("),
    ],
)
def test_mistakes_in_toml(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        flags_of(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def leaves(options: Any, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = prefix + field.name
        found += leaves(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return found


def changed(options: Any, name: str) -> Any:
    first, _, rest = name.partition(".")
    value = changed(getattr(options, first), rest) if rest else "something else"
    return dataclasses.replace(options, **{first: value})


@pytest.mark.parametrize("name", leaves(RunOptions()))
def test_what_a_resumed_run_may_change(name: str) -> None:
    free = any(name == each or name.startswith(each + ".") for each in FREE_ON_RESUME)
    found = differences(RunOptions(), changed(RunOptions(), name))
    if free:
        assert found == []
    else:
        (fault,) = found
        assert fault.startswith(f"{name.replace('_', '-')}: found something else, expected ")


def test_nothing_changed() -> None:
    assert differences(RunOptions(), RunOptions()) == []
    validate(RunOptions())
