"""The contract of every optimizer: its definition, decoupled decay, layers independent of each other.

Every test runs for all names in `Optimizer`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.tree_util import keystr

from parity_tests.harness.child_process import output_lines
from parity_tests.reference.errors import relative_error, worst
from parity_tests.train.program.optimizer_definitions import DEFINITIONS, trajectory
from parity_tests.train.program.test_optimizer import named
from parity_tests.train.runs import Tiny, metrics_of, run_flags, same_bits, state_of
from train.__main__ import main
from train.checkpoints import FOLDER
from train.options import Optimizer
from train.program.optimizer import DIRECTIONS, decay_mask, global_norm, make_optimizer
from train.program.per_layer import is_stacked

NAMES = get_args(Optimizer)
# those whose update depends on a complete parameter, not on each number alone
NOT_ELEMENTWISE = ("adafactor", "muon")
# an eps that is large enough to show
OPTIONS: dict[str, Any] = {"beta1": 0.8, "beta2": 0.9, "eps": 0.01}
RATES = (0.02, 0.05, 0.03, 0.01)
DECAY = 0.3


def tree(make: Any) -> Any:
    """Parameters of every kind: stacked or not, matrices and vectors, factored by adafactor or not."""
    return {
        "lm_head": {"weight": make(130, 128)},
        "model": {
            "embed_tokens": {"weight": make(6, 4)},
            "norm": {"weight": make(4)},
            "layers": {
                "norm": {"weight": make(3, 4)},
                "proj": {"weight": make(3, 5, 4), "bias": make(3, 5)},
                "up": {"weight": make(3, 128, 131)},
                "square": {"weight": make(3, 4, 4)},
            },
        },
    }


def random_tree(seed: int, sizes: tuple[float, ...] = (0.01, 1.0, 30.0)) -> Any:
    """Normally distributed numbers; the layers have very different scales."""
    rng = np.random.default_rng(seed)

    def make(*shape: int) -> np.ndarray:
        values = rng.normal(size=shape)
        stacked = len(shape) > 1 and shape[0] == len(sizes)
        return values * np.reshape(sizes, (-1,) + (1,) * (len(shape) - 1)) if stacked else values

    return tree(make)


def one_step(rule: Any) -> Any:
    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(rule: Any, params: Any, gradients: list[Any], step: Any = None) -> Any:
    step = step or one_step(rule)
    state = rule.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def test_every_optimizer_has_a_definition() -> None:
    assert set(NAMES) == set(DEFINITIONS) == set(DIRECTIONS)
    assert {option for direction in DIRECTIONS.values() for option in direction.uses} == set(
        OPTIONS
    )


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient_only_decay_changes_weights(name: Optimizer) -> None:
    """After 100 steps at rate r and decay d, weights of 1 are (1 - r d)^100; the others are unchanged."""
    rate, decay = 1e-3, 0.1
    rule = make_optimizer(name, rate, **OPTIONS, weight_decay=decay, clip_norm=1.0)
    ones = tree(lambda *shape: jnp.ones(shape))
    zeros = jax.tree.map(jnp.zeros_like, ones)
    with jax.numpy_dtype_promotion("standard"):
        state = rule.init(ones)

        def step(_: Any, carry: Any) -> Any:
            params, state = carry
            updates, state = rule.update(zeros, state, params)
            return optax.apply_updates(params, updates), state

        params, _ = jax.jit(lambda *start: jax.lax.fori_loop(0, 100, step, start))(ones, state)
    decays = named(decay_mask(ones))
    for path, values in named(params).items():
        expected = (1 - rate * decay) ** 100 if decays[path] else 1.0
        np.testing.assert_allclose(values, expected, rtol=1e-5 * bool(decays[path]), err_msg=path)
    assert abs((1 - rate * decay) ** 100 - 0.990) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_first_steps_are_the_definition(name: Optimizer) -> None:
    """In float64, with decay and a changing rate; each layer is a separate parameter."""
    start, gradients = random_tree(0), [random_tree(seed) for seed in range(1, 5)]
    with jax.enable_x64(True):
        rule = make_optimizer(
            name,
            lambda step: jnp.asarray(RATES)[step],
            **OPTIONS,
            weight_decay=DECAY,
            clip_norm=None,
        )
        actual = named(run(rule, *jax.tree.map(jnp.asarray, (start, gradients))))
    decays = named(decay_mask(start))
    flat = [named(gradient) for gradient in gradients]
    expected = {}
    for path, values in named(start).items():
        layer = ".layers." in path
        decay = DECAY * bool(decays[path])
        options = OPTIONS | {"layer": layer}

        def alone(p: np.ndarray, g: list[np.ndarray], decay: Any = decay, o: Any = options) -> Any:
            return trajectory(name, p, g, RATES, decay, o)

        steps = [gradient[path] for gradient in flat]
        expected[path] = (
            np.stack([alone(p, [g[n] for g in steps]) for n, p in enumerate(values)])
            if layer
            else alone(values, steps)
        )
    error, where = worst(actual, expected)
    print(f"{name}: {error:.1e} ({where})")
    assert error <= 1e-9, where
    # and layer by layer, as the largest would hide the smallest
    for path in expected:
        if ".layers." in path:
            assert max(map(relative_error, actual[path], expected[path])) <= 1e-9, path


# torch's optimizers
def torch_rule(name: str, p: torch.nn.Parameter, rate: float) -> torch.optim.Optimizer | None:
    betas = OPTIONS["beta1"], OPTIONS["beta2"]
    if name == "adamw":
        return torch.optim.AdamW([p], rate, betas, OPTIONS["eps"], DECAY)
    if name == "sgd":
        return torch.optim.SGD([p], rate, OPTIONS["beta1"])
    if name == "adafactor":
        return torch.optim.Adafactor([p], rate, eps=(1e-30, 1e-3), weight_decay=DECAY)
    if name == "muon":
        return torch.optim.Muon(
            [p],
            *(rate, DECAY, OPTIONS["beta1"]),
            eps=OPTIONS["eps"],
            adjust_lr_fn="match_rms_adamw",
        )
    return None


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon"])
def test_the_definition_agrees_with_torch(name: str) -> None:
    """torch's SGD couples weight decay, so it is applied separately here; its Muon iterates in bfloat16."""
    rng = np.random.default_rng(0)
    shape, rate = (130, 140), 0.02
    start, *gradients = (rng.normal(size=shape) for _ in range(5))
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    rule = torch_rule(name, parameter, rate)
    assert rule is not None
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        if name == "sgd":
            parameter.data.mul_(1 - rate * DECAY)
        rule.step()
    expected = parameter.detach().numpy() - start
    options = OPTIONS | {"layer": True}
    actual = trajectory(name, start, gradients, [rate] * 4, DECAY, options) - start
    error = relative_error(actual, expected)
    print(f"{name}: {error:.1e}")
    assert error <= (0.02 if name == "muon" else 1e-9)


def alone(name: Optimizer) -> Any:
    """The direction as its library makes it, without `per_layer`."""
    direction = DIRECTIONS[name]
    return direction.make(**{option: OPTIONS[option] for option in direction.uses})


def layer_of(params: Any, layer: int) -> Any:
    return {"model": {"layers": jax.tree.map(lambda x: x[layer], params["model"]["layers"])}}


@pytest.mark.parametrize(
    ("name", "layers"),
    [(name, 2) for name in NAMES]
    # the others are elementwise, so fewer layers suffice
    + [
        pytest.param(name, 129, marks=() if name in NOT_ELEMENTWISE else pytest.mark.slow)
        for name in NAMES
    ],
)
def test_a_stack_is_updated_like_its_layers_alone(name: Optimizer, layers: int) -> None:
    """In float32; also with more layers than rows, where the two longest axes are not the matrix's."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(0.01, 1, layers)
    shapes = {"wide": (129, 130) if layers == 2 else (4, 128), "vector": (7,)}

    def draw() -> Any:
        stacks = {
            path: np.stack([size * rng.normal(size=shape) for size in sizes]).astype(np.float32)
            for path, shape in shapes.items()
        }
        return {"model": {"layers": stacks, "norm": {"weight": np.ones(3, np.float32)}}}

    start, gradients = draw(), [draw() for _ in range(3)]
    rule = make_optimizer(name, 0.05, **OPTIONS, weight_decay=DECAY, clip_norm=None)
    stacked = run(rule, start, gradients)
    one = optax.chain(
        alone(name), optax.add_decayed_weights(DECAY), optax.scale_by_learning_rate(0.05)
    )
    step = one_step(one)
    for layer in {0, 1, layers // 2, layers - 1}:
        first = layer_of(start, layer)
        alone_after = run(one, first, [layer_of(g, layer) for g in gradients], step)
        actual, expected = (
            named(jax.tree.map(lambda a, b: np.asarray(a) - b, after, first))
            for after in (layer_of(stacked, layer), alone_after)
        )
        error, where = worst(actual, expected)
        assert error <= 2e-6, (where, layer)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_that_of_every_layer_alone(name: Optimizer) -> None:
    """With a leading axis of layers, nothing added, and one count of steps for all."""
    params = tree(lambda *shape: jnp.ones(shape))
    rule = make_optimizer(name, 1.0, **OPTIONS, weight_decay=0.1, clip_norm=1.0)
    of_one = shapes_of(alone(name), layer_of(params, 0))
    seen = 0
    for path, shape in shapes_of(rule, params).items():
        before, stacked, name_in_layer = path.partition(".model.layers.")
        if not stacked:
            continue
        candidates = [one for one in of_one if before.endswith(one.partition(".model.")[0])]
        (match,) = (one for one in candidates if one.endswith(stacked + name_in_layer))
        assert shape == (3, *of_one[match]), path
        seen += 1
    assert seen == sum(".model.layers." in path for path in of_one) > 0


def shapes_of(rule: Any, params: Any) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(rule.init, params))
    return {keystr(path, simple=True, separator="."): leaf.shape for path, leaf in flat}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip", [0.5, 1e6, None])
def test_clipping_is_by_the_norm_of_the_complete_tree(clip: float | None, dtype: str) -> None:
    """As in float64; everything is scaled alike, and bfloat16 is summed in float32."""
    gradients = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), random_tree(0))
    exact = {path: np.asarray(leaf, np.float64) for path, leaf in named(gradients).items()}
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in exact.values()))
    np.testing.assert_allclose(float(global_norm(gradients)), norm, rtol=1e-6)
    rule = make_optimizer("sgd", 1.0, **OPTIONS, weight_decay=0.0, clip_norm=clip)
    with jax.numpy_dtype_promotion("standard"):
        updates = named(jax.jit(rule.update)(gradients, rule.init(gradients), gradients)[0])
    scale = 1.0 if clip is None else min(1.0, clip / norm)
    for path, leaf in exact.items():
        expected = jnp.asarray(-leaf * scale, dtype)
        np.testing.assert_allclose(
            updates[path].astype(np.float64),
            np.asarray(expected, np.float64),
            rtol=1e-2 if dtype == "bfloat16" else 1e-6,
        )
        assert updates[path].dtype == jnp.dtype(dtype)


def test_which_parameters_are_stacked() -> None:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree(lambda *shape: np.zeros(shape)))
    assert sum(is_stacked(path) for path, _ in flat) == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_do_not_change(name: Optimizer, dtype: str) -> None:
    params = tree(lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
    rule = make_optimizer(
        name, optax.constant_schedule(1e-3), **OPTIONS, weight_decay=0.1, clip_norm=1.0
    )
    before = jax.eval_shape(rule.init, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, after = jax.eval_shape(rule.update, params, before, params)
    kinds = [
        jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        for tree in (before, after, params, updates)
    ]
    assert kinds[0] == kinds[1]
    assert kinds[2] == kinds[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bit_for_bit_the_same(name: Optimizer, tiny: Tiny, tmp_path: Path) -> None:
    unused = {"beta1", "beta2", "eps"} - {*DIRECTIONS[name].uses}
    options = {f"optimizer__{key}": value for key, value in OPTIONS.items() if key not in unused}
    full = tmp_path / "full"
    flags = run_flags(tiny, full, steps=6, optimizer__name=name, **options)
    assert main(flags) == 0
    copy = Path(shutil.copytree(full, tmp_path / "copy"))
    shutil.rmtree(copy / FOLDER / "6")
    assert main(["resume", str(copy)]) == 0
    assert same_bits(state_of(copy, 6), state_of(full, 6))
    assert metrics_of(copy) == metrics_of(full)


@pytest.mark.parametrize(
    ("meshes", "names"), [(1, NOT_ELEMENTWISE), pytest.param(3, NAMES, marks=pytest.mark.slow)]
)
def test_over_a_mesh(meshes: int, names: tuple[str, ...]) -> None:
    """Two steps over eight devices equal those on one; a device holds about an eighth of the state."""
    lines = output_lines("train.program.sharded_optimizer", str(meshes), *names)
    print("\n".join(lines))
    assert [line.split()[0] for line in lines] == [name for name in names for _ in range(meshes)]
    for line in lines:
        _, error, share = line.split()
        assert float(error) <= 2e-6, line
        assert float(share) <= 0.2, line
