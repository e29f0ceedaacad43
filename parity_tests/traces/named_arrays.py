"""The arrays that a JAX program names with `jax.ad_checkpoint.checkpoint_name`, and their gradients.

The names are in the program's jaxpr, which is evaluated anew here, equation by equation. Where an array is
named, it is kept, and zeros are added to it: the gradient with respect to these zeros is the array's.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

Named = dict[str, list[jax.Array]]
"""All arrays of each name, in the order of computation."""

_CALLS = {  # primitives that run a jaxpr once, and where they have it
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


class _Entry(NamedTuple):
    """An array, or with `stacked` one for each iteration of a loop, on a leading axis."""

    array: Any
    stacked: bool


def with_named_arrays(function: Callable[..., Any]) -> Callable[..., tuple[Any, Named]]:
    """`function` with two results: its own, and the arrays that it names.

    The new function's first argument are arrays that are added to the named ones, or None. A name within a
    scan has one array for each iteration. Names within while loops, branches, `shard_map` and scans in
    scans are left out, and so are arrays of integers, which have no gradient.

    >>> from jax.ad_checkpoint import checkpoint_name
    >>> def program(x):
    ...     return 3 * checkpoint_name(2 * x, "doubled")
    >>> out, named = with_named_arrays(program)(None, jnp.float32(5))
    >>> float(out), [float(array) for array in named["doubled"]]
    (30.0, [10.0])
    >>> gradient = jax.grad(lambda added: with_named_arrays(program)(added, jnp.float32(5))[0])
    >>> float(gradient({"doubled": [jnp.float32(0)]})["doubled"][0])
    3.0
    """

    def run(added: Named | None, *arguments: Any) -> tuple[Any, Named]:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        interpreter = _Interpreter(added, (*_CALLS, "scan"))
        leaves = jax.tree.leaves(arguments)
        results = interpreter.evaluate(closed.jaxpr, closed.consts, leaves)
        named = {
            name: [array for entry in entries for array in _unstacked(entry)]
            for name, entries in interpreter.entries.items()
        }
        return jax.tree.unflatten(jax.tree.structure(shape), results), named

    return run


def _unstacked(entry: _Entry) -> list[Any]:
    return list(entry.array) if entry.stacked else [entry.array]


class _Interpreter:
    """Evaluates a jaxpr, and keeps what it names, also within the primitives that are entered."""

    def __init__(self, added: Named | None, entered: Container[str]) -> None:
        self.entries: dict[str, list[_Entry]] = {}
        self._added = added
        self._entered = entered
        self._used: dict[str, int] = {}

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = {}

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, core.Literal) else values[variable]

        values |= zip(jaxpr.constvars, consts, strict=True)
        values |= zip(jaxpr.invars, arguments, strict=True)
        for equation in jaxpr.eqns:
            inputs = [read(variable) for variable in equation.invars]
            outputs = self._equation(equation, inputs)
            values |= zip(equation.outvars, outputs, strict=True)
        return [read(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Any]) -> list[Any]:
        kind, parameters = equation.primitive.name, equation.params
        name = _name_of(equation)
        if name is not None:
            return [self._name(name, inputs[0])]
        if kind not in self._entered or not any(
            _names(jaxpr, self._entered) for jaxpr in _inner(equation)
        ):
            options = equation.primitive.get_bind_params(parameters)
            with equation.ctx.manager:
                outputs = equation.primitive.bind(*inputs, **options)
            return list(outputs) if equation.primitive.multiple_results else [outputs]
        if kind in _CALLS:
            inner = parameters[_CALLS[kind]]
            if isinstance(inner, core.ClosedJaxpr):
                return self.evaluate(inner.jaxpr, inner.consts, inputs)
            return self.evaluate(inner, (), inputs)
        return self._scan(parameters, inputs)

    def _name(self, name: str, array: Any) -> Any:
        added = self._next(name)
        array = array if added is None else array + added
        self.entries.setdefault(name, []).append(_Entry(array, stacked=False))
        return array

    def _next(self, name: str, count: int = 1) -> Any:
        """What is added to the next arrays of a name: one, or several stacked."""
        if self._added is None or name not in self._added:
            return None
        first = self._used.get(name, 0)
        self._used[name] = first + count
        arrays = self._added[name][first : first + count]
        return arrays[0] if count == 1 else arrays

    def _scan(self, parameters: Any, inputs: list[Any]) -> list[Any]:
        body, length = parameters["jaxpr"], parameters["length"]
        consts, carry = _scan_counts(parameters)
        start, xs = inputs[consts : consts + carry], inputs[consts + carry :]
        added = self._of_iterations(body.jaxpr, length)
        kept: list[str] = []

        def step(state: Any, slices: Any) -> Any:
            of_iteration, added = slices
            inner = _Interpreter(added, _CALLS)  # not scans in it
            arguments = [*inputs[:consts], *state, *of_iteration]
            outputs = inner.evaluate(body.jaxpr, body.consts, arguments)
            named = [(name, e.array) for name, entries in inner.entries.items() for e in entries]
            kept[:] = [name for name, _ in named]
            arrays = [array for _, array in named]
            return outputs[:carry], (outputs[carry:], arrays)

        options = {key: parameters[key] for key in ("reverse", "unroll")}
        end, (ys, arrays) = jax.lax.scan(step, start, (xs, added), length, **options)
        for name, array in zip(kept, arrays, strict=True):
            self.entries.setdefault(name, []).append(_Entry(array, stacked=True))
        return [*end, *ys]

    def _of_iterations(self, body: Any, length: int) -> Named | None:
        """What is added within a scan, stacked over its iterations."""
        if self._added is None:
            return None
        stacked: Named = {}
        for name in _names(body, _CALLS):
            arrays = self._next(name, length)
            if arrays is not None:
                arrays = [arrays] if length == 1 else arrays
                stacked.setdefault(name, []).append(jnp.stack(arrays))
        return stacked


def _scan_counts(parameters: Any) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in parameters:
        return parameters["num_consts"], parameters["num_carry"]
    consts, carry, _ = (len(part) for part in parameters["ft_in"].unpack())  # since JAX 0.12
    return consts, carry


def _name_of(equation: Any) -> str | None:
    """The name that an equation gives to an array of floats."""
    if equation.primitive.name != "name":
        return None
    is_float = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
    return equation.params["name"] if is_float else None


def _names(jaxpr: Any, entered: Container[str]) -> list[str]:
    """The names in a jaxpr and in what these primitives run in it, in order."""
    names = []
    for equation in jaxpr.eqns:
        name = _name_of(equation)
        if name is not None:
            names.append(name)
        elif equation.primitive.name in entered:
            names += [name for inner in _inner(equation) for name in _names(inner, entered)]
    return names


def _inner(equation: Any) -> list[Any]:
    """The jaxprs that an equation runs."""
    leaves = jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr),
    )
    return [
        leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf
        for leaf in leaves
        if isinstance(leaf, core.ClosedJaxpr | core.Jaxpr)
    ]
