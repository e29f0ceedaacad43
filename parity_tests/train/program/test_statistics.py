"""Statistics of a step: right against the oracle and numpy, and without any effect on the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.interpreters import partial_eval

from llama_jax.config import LlamaConfig
from llama_jax.formatting import first_line
from llama_jax.models.causal_lm import LlamaForCausalLM
from parity_tests.harness.child_process import output_lines
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.reference import oracle
from parity_tests.reference.errors import relative_error
from parity_tests.train.runs import CONFIG, same_bits
from train.data.batch import Batch
from train.option_checks import validate
from train.options import LogOptions, ModelOptions, OptimizerOptions, RunOptions
from train.program.build import Program, initial_opt_state, initial_params, run_program
from train.program.statistics import Statistics, make_observe
from train.program.step import make_step

MODEL = CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 4, "mlp_bias": True}
LENGTH = 32
# of 8 heads and of 32 queries
HEADS, QUERIES = [0, 2, 4, 6], np.arange(1, LENGTH, 2)
# slopes of activations at very negative and at large inputs
LIMITS = {"silu": (0, 1), "relu": (0, 1), "tanh": (0, 0), "gelu": (0, 1)}


@pytest.fixture(autouse=True)
def restore_x64() -> Iterator[None]:
    yield
    jax.config.update("jax_enable_x64", False)  # a program in float64 turns it on


def program_of(**changes: Any) -> Program:
    model = ModelOptions(**{"parameter_dtype": "float64"} | changes.pop("model", {}))
    options = RunOptions(**{"batch_size": 4, "sequence_length": LENGTH, "model": model} | changes)
    config = LlamaConfig.from_dict(MODEL | {"hidden_act": "silu"})
    return run_program(options, config, jax.devices()[:1])


def packed_batch(micro: int = 2, rows: int = 2) -> Batch:
    rng = np.random.default_rng(1)
    shape = micro, rows, LENGTH
    ids = rng.integers(0, MODEL["vocab_size"], shape).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, shape), -1).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    return Batch(ids, np.roll(ids, -1, -1), segments, positions)


def by_name(params: Any) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.array(leaf)
        for path, leaf in flat
    }


def expected_activations(
    config: dict[str, Any], params: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> dict[str, np.ndarray]:
    """From what the oracle computes on the way."""
    layers = config["num_hidden_layers"]
    weights = {}
    for name, array in by_name(params).items():
        if ".layers." in name:
            for layer in range(layers):
                single = name.replace(".layers.", f".layers.{layer}.")
                weights[single] = torch.tensor(array[layer])
        else:
            weights[name] = torch.tensor(array)
    recorded: dict[str, list[Any]] = {"logits": [], "layer": [], "gate": []}

    def record(name: str, function: Callable[..., Any], value: Callable[..., Any]) -> None:
        def run(*arguments: Any) -> Any:
            out = function(*arguments)
            if (found := value(out, *arguments)) is not None:
                recorded[name].append(found)
            return out

        monkeypatch.setattr(oracle, function.__name__, run)

    def logits(_: Any, q: Any, k: Any, v: Any, visible: Any) -> Any:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)[:, HEADS][:, :, QUERIES]
        return scores, visible.expand(q.shape[0], 1, LENGTH, LENGTH)[:, :, QUERIES]

    record("logits", oracle.attention, logits)
    record("layer", oracle.decoder_layer, lambda out, *_: out[0])
    record("gate", oracle.linear, lambda out, w, name, *_: out if "gate_proj" in name else None)
    rows = [torch.tensor(np.array(x)).long().flatten(0, 1) for x in batch[:4]]
    oracle.decode(config, weights, input_ids=rows[0], segment_ids=rows[2], position_ids=rows[3])

    expected: dict[str, list[Any]] = {}
    for (scores, visible), out, gate in zip(*recorded.values(), strict=True):
        seen = scores[visible.expand_as(scores)]
        weights_of = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        entropy = torch.special.entr(weights_of).sum(-1).mean((0, 2))
        gate = gate.clone().requires_grad_()
        activated = oracle.ACTIVATIONS[config["hidden_act"]](gate)
        (slope,) = torch.autograd.grad(activated.sum(), gate)
        dead = (activated.abs() <= 0.01).all(0).all(0)
        flat = [
            ((slope - limit).abs() <= 0.01).all(0).all(0) for limit in LIMITS[config["hidden_act"]]
        ]
        values = {
            "residual_rms": out.square().mean().sqrt(),
            "residual_max": out.abs().max(),
            "logit_rms": seen.square().mean().sqrt(),
            "logit_max": seen.abs().max(),
            "entropy": entropy,
            "dead_units": dead.double().mean(),
            "saturated_units": ((flat[0] | flat[1]) & ~dead).double().mean(),
        }
        for name, value in values.items():
            expected.setdefault(name, []).append(value.detach().numpy())
    return {name: np.stack(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    "act",
    ["silu", *(pytest.param(act, marks=pytest.mark.slow) for act in ("tanh", "relu", "gelu"))],
)
def test_activations_are_the_oracles(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.enable_x64(True):
        program = program_of()
        graphdef = program.graphdef
        if act != "silu":
            config = LlamaConfig.from_dict(MODEL | {"hidden_act": act})
            model = nnx.eval_shape(
                lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.float64)
            )
            graphdef = nnx.split(model)[0]
        params = initial_params(program, 3)
        gate = params["model"]["layers"]["mlp"]["gate_proj"]
        # dead for most activations, saturated, and dead for any
        bias = gate["bias"].at[:, 0].set(-30).at[0, 1:3].set(30)
        gate |= {"bias": bias, "weight": gate["weight"].at[1, 3:6].set(0)}
        query = params["model"]["layers"]["self_attn"]["q_proj"]
        query["weight"] *= 30  # attention that is not uniform
        batch = packed_batch()
        observe = make_observe(graphdef, compute_dtype=jnp.float64, attention_implementation=None)
        run = jax.jit(observe, compiler_options=FAST_COMPILE)
        actual = run(params, params, params, batch).activations._asdict()
        expected = expected_activations(MODEL | {"hidden_act": act}, params, batch, monkeypatch)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= 1e-12, name
    print(act, {name: value.round(3).tolist() for name, value in expected.items()})
    assert expected["dead_units"][1] > 0
    assert expected["saturated_units"][0] > 0
    assert (np.ptp(expected["entropy"], axis=1) > 0.01).all()


def steps(
    program: Program, count: int, micro: int
) -> tuple[list[np.ndarray], list[np.ndarray], Statistics, Any, Any]:
    """`count` steps with statistics and without: their parameters and states; of the last with
    statistics these, the parameters before and after."""
    states = []
    for _ in range(2):
        params = initial_params(program, 0)
        states.append((params, initial_opt_state(program, params)))
    (params, state), (other_params, other_state) = states
    for number in range(count):
        batch = packed_batch(micro, 4 // micro)
        batch = batch._replace(input_ids=np.roll(batch.input_ids, number, -1))
        before = by_name(params)
        params, state, metrics, statistics = program.statistics_step(params, state, batch, None)
        other_params, other_state, other, *rest = program.step(
            other_params, other_state, batch, None
        )
        assert not rest
        assert same_bits(*([np.asarray(x) for x in one] for one in (metrics, other)))
    leaves = [
        [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        for tree in ((params, state), (other_params, other_state))
    ]
    return *leaves, statistics, before, by_name(params)


@pytest.mark.parametrize(
    ("micro", "optimizer", "model"),
    [
        (2, "adamw", {}),
        pytest.param(1, "adamw", {"remat": "none"}, marks=pytest.mark.slow),
        pytest.param(1, "muon", {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param(2, "lion", {"compute_dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param(1, "adafactor", {"scan_unroll": 2}, marks=pytest.mark.slow),
        pytest.param(2, "sgd", {"parameter_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_the_update_is_the_same_bit_for_bit(micro: int, optimizer: Any, model: Any) -> None:
    """And its norms are those of the parameters before and after."""
    program = program_of(
        micro_batches=micro,
        model={"parameter_dtype": "float32"} | model,
        optimizer=OptimizerOptions(name=optimizer, schedule="constant", warmup_steps=0),
    )
    with jax.set_mesh(program.mesh):
        one, other, statistics, before, after = steps(program, 3, micro)
    assert same_bits(one, other)
    assert statistics.norms.keys() == before.keys()
    for name, norms in statistics.norms.items():
        old, new = before[name].astype(np.float64), after[name].astype(np.float64)
        stacked = ".layers." in name
        axes = tuple(range(int(stacked), old.ndim))
        for actual, array in ((norms.update, new - old), (norms.parameter, old)):
            expected = np.sqrt(np.square(array).sum(axis=axes))
            np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)
            assert actual.shape == ((2,) if stacked else ())


def test_gradients_are_those_of_the_step() -> None:
    """An optimizer that subtracts the gradient shows it in the parameters."""
    with jax.enable_x64(True):
        program = program_of()
        observe = make_observe(
            program.graphdef, compute_dtype=jnp.float64, attention_implementation=None
        )
        step = make_step(
            program.graphdef,
            optax.with_extra_args_support(optax.sgd(1.0)),
            compute_dtype=jnp.float64,
            z_loss=0.0,
            observe=observe,
        )
        params = initial_params(program, 0)
        state = optax.sgd(1.0).init(params)
        run = jax.jit(step, compiler_options=FAST_COMPILE)
        after, _, metrics, statistics = run(params, state, packed_batch(), None)
    before, squares = by_name(params), 0.0
    for name, array in by_name(after).items():
        norms = statistics.norms[name]
        gradient = array - before[name]
        axes = tuple(range(int(".layers." in name), gradient.ndim))
        expected = np.square(gradient).sum(axis=axes)
        np.testing.assert_allclose(np.square(norms.gradient), expected, rtol=1e-9, err_msg=name)
        squares += np.square(norms.gradient).sum()
    np.testing.assert_allclose(np.sqrt(squares), metrics.grad_norm, rtol=1e-12)


def test_without_statistics_the_program_is_the_same() -> None:
    """What remains of the step with statistics, if nobody reads them, is the step without."""
    program = program_of(model={"parameter_dtype": "float32"})
    options: Any = {"compute_dtype": jnp.float32, "z_loss": 0.0}
    observe = make_observe(
        program.graphdef, compute_dtype=jnp.float32, attention_implementation=None
    )
    arguments = program.params, program.opt_state, program.batch, None
    texts = []
    for chosen in (None, observe):
        step = make_step(program.graphdef, program.optimizer, observe=chosen, **options)
        jaxpr = jax.make_jaxpr(lambda *a, step=step: step(*a)[:3])(*arguments).jaxpr
        jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
        constants = [variable for variable in jaxpr.constvars if id(variable) in used]
        texts.append(str(jaxpr.replace(constvars=constants)))
    assert texts[0] == texts[1]
    assert len(texts[0]) > 1000
    assert "optimization_barrier" in str(
        jax.make_jaxpr(make_step(program.graphdef, program.optimizer, observe=observe, **options))(
            *arguments
        )
    )
    # an option of the run does not change it either
    lowered = [
        program_of(log=LogOptions(statistics_every=every)).step.lower(*arguments).as_text()
        for every in (0, 2)
    ]
    assert lowered[0] == lowered[1]


@pytest.mark.parametrize("every", [-1, -100])
def test_a_negative_interval(every: int) -> None:
    with pytest.raises(ValueError) as error:
        validate(RunOptions(log=LogOptions(statistics_every=every)))
    assert str(error.value) == f"log.statistics-every: found {every}, expected at least 0"
    assert first_line(error.value) == str(error.value)


@pytest.mark.parametrize("meshes", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_over_a_mesh(meshes: int) -> None:
    """Statistics are those of one device; the update is that of the step on the same mesh."""
    lines = output_lines("workers.sharded_statistics", str(meshes))
    print("\n".join(lines))
    assert len(lines) == meshes
    for line in lines:
        *_, error, same = line.split()
        assert 0 < float(error) <= 1e-11, line
        assert same == "True", line
