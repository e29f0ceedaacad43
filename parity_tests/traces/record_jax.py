"""Record what a Llama written in JAX computes."""

import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.checkpoints.safetensors_write import TensorSpec
from parity_tests.traces.named_arrays import Named, with_named_arrays
from parity_tests.traces.names import INPUTS, place
from parity_tests.traces.trace import digest
from parity_tests.traces.write import Load, require_new, require_room, write_trace

Target = str | Callable[[jax.Array], Mapping[str, jax.Array]]
"""The name in a trace, or a function of the array that returns arrays by such names."""

_LAYER = "{layer}"


def record_jax(
    loss: Callable[[Any], Any],
    parameters: Any,
    out: str | Path,
    *,
    inputs: Mapping[str, Any],
    names: Mapping[str, Target],
    weights: Callable[[Any], Mapping[str, Any]],
    backward: bool = True,
    num_items: float | None = None,
    program: str = "JAX program",
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Run a JAX program once, forward and backward, and write a trace of the arrays that it names.

    Arrays have names by `jax.ad_checkpoint.checkpoint_name(array, "name")`, anywhere but in loops other
    than scans, or because the program returns them. Only the former have gradients. The names of `names`
    may contain {layer}. Where one name has several arrays, of unrolled layers or of a scan, they are the
    layers in their order. All named arrays are held on the devices until the program ends.

    Args:
        loss: function of the parameters that returns the loss, or the loss and a dict of arrays by name; it
            may be sharded over the devices of a mesh.
        parameters: a tree of arrays.
        out: the folder to write; must not exist.
        inputs: `input_ids` [B, T], and whichever of `labels` (not shifted), `attention_mask`,
            `position_ids` and `segment_ids` the program uses.
        names: the program's names -> names of a trace, such as
            `model.layers.{layer}.self_attn.q_proj.output`. For an array in another layout, such as that of
            a fused projection, a function that slices, transposes or reshapes it and returns arrays by such
            names; it is also called with gradients.
        weights: function that slices, transposes or reshapes the parameters and returns them by Hugging
            Face's names, in its shapes [out, in]; it is also called with gradients.
        backward: record gradients too.
        num_items: what the sum of the loss is divided by, if not by the number of labels that count.
        program: what was recorded, for people.
        settings: of precision, what cannot be seen from here; `matmul` is "float32", "tf32", "bfloat16_3x"
            or "bfloat16", the format to which operands of float32 matmuls are rounded.
        quiet: do not print how large the trace will be.

    Returns:
        The folder.

    Raises:
        ValueError: names that the program does not have, or that are none of a trace; a folder that exists;
            too little room on its disk.
    """
    folder = Path(out)
    require_new(folder)
    unknown = [name for name in inputs if name not in INPUTS]
    if unknown or "input_ids" not in inputs:
        raise ValueError(
            f"inputs: found {', '.join(inputs)}, expected input_ids and any of {', '.join(INPUTS)}"
        )

    def run(parameters: Any, added: Named | None) -> tuple[jax.Array, Any]:
        def with_returned(parameters: Any) -> tuple[jax.Array, Mapping[str, jax.Array]]:
            result = loss(parameters)
            return result if isinstance(result, tuple) else (result, {})

        (value, returned), named = with_named_arrays(with_returned)(added, parameters)
        return value, (returned, _wanted(named, names))

    returned, named = jax.eval_shape(lambda p: run(p, None)[1], parameters)
    _require_names(names, [*named, *returned])
    results: tuple[jax.Array, Any]
    gradients: Any = None
    if backward:
        added = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), named)
        step = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
        results, gradients = jax.jit(step)(parameters, added)
    else:
        results = jax.jit(lambda p: run(p, None))(parameters)
    value, (returned, named) = results

    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in inputs.items()}
    arrays["loss"] = value
    listed = {name: [array] for name, array in returned.items() if _find(names, name) is not None}
    arrays |= _all_targets(names, listed | named, "")
    tensors = weights(parameters)
    if backward:
        of_parameters, of_named = gradients
        arrays |= _all_targets(names, of_named, "_grad")
        arrays |= {f"{name}.grad": array for name, array in weights(of_parameters).items()}
    for name in arrays:
        if place(name) is None:
            raise ValueError(f"names: {name!r} is not the name of an array of a trace")
    specs = {name: _spec(name, array) for name, array in arrays.items()}
    size = sum(spec.nbytes for spec in specs.values())
    require_room(folder, size)
    if not quiet:
        print(f"recording {size / 1e6:.2f} MB into {folder}", file=sys.stderr)
    loads: dict[str, tuple[TensorSpec, Load]] = {
        name: (specs[name], partial(np.asarray, array)) for name, array in arrays.items()
    }
    write_trace(
        folder,
        loads,
        _facts(program, tensors, settings or {}) | {"num_items_in_batch": num_items},
        {name: digest(np.asarray(tensor)) for name, tensor in tensors.items()},
    )
    return folder


def sown(state: nnx.State[Any, Any]) -> dict[str, jax.Array]:
    """What `nnx.capture` collected of a model's modules, for the dict that `loss` returns.

    The names are paths, with keys joined by dots. Of what a module has sown several times, the last counts.

    >>> class Doubled(nnx.Module):
    ...     def __call__(self, x):
    ...         self.sow(nnx.Intermediate, "twice", 2 * x)
    ...         return x
    >>> _, state = nnx.capture(Doubled(), nnx.Intermediate)(jnp.float32(3))
    >>> {name: float(array) for name, array in sown(state).items()}
    {'twice': 6.0}
    """
    arrays = {}
    for path, variable in nnx.to_flat_state(state):
        values = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        arrays[".".join(map(str, path))] = values[-1] if isinstance(values, tuple) else values
    return arrays


def _wanted(named: Named, names: Mapping[str, Target]) -> Named:
    return {name: arrays for name, arrays in named.items() if _find(names, name) is not None}


def _find(names: Mapping[str, Target], name: str) -> tuple[str, int | None] | None:
    """The key of `names` that a name matches, and the layer in the name."""
    for key in names:
        pattern = re.escape(key).replace(re.escape(_LAYER), r"(\d+)", 1)
        match = re.fullmatch(pattern, name)
        if match is not None:
            return key, int(match[1]) if match.groups() else None
    return None


def _require_names(names: Mapping[str, Target], present: list[str]) -> None:
    matched = {found[0] for found in (_find(names, name) for name in present) if found is not None}
    missing = [key for key in names if key not in matched]
    if missing:
        have = ", ".join(sorted(present)) or "none"
        raise ValueError(
            f"names: the program has no array named {missing[0]!r} that can be recorded; it has: {have}"
        )


def _all_targets(names: Mapping[str, Target], named: Named, suffix: str) -> dict[str, jax.Array]:
    arrays: dict[str, jax.Array] = {}
    for name, of_name in named.items():
        found = _find(names, name)
        assert found is not None
        key, layer = found
        for index, array in enumerate(of_name):
            target, at = names[key], str(index if layer is None else layer)
            parts = {target: array} if isinstance(target, str) else target(array)
            arrays |= {part.replace(_LAYER, at) + suffix: a for part, a in parts.items()}
    return arrays


def _spec(name: str, array: Any) -> TensorSpec:
    return TensorSpec(name, np.dtype(array.dtype), tuple(array.shape))


def _facts(program: str, weights: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    device = jax.devices()[0]
    dtypes = sorted({np.dtype(tensor.dtype).name for tensor in weights.values()})
    layers = [int(m[1]) for m in (re.match(r"model\.layers\.(\d+)\.", n) for n in weights) if m]
    embedding = weights.get("model.embed_tokens.weight")
    return {
        "program": program,
        "versions": {"jax": jax.__version__},
        "device": device.device_kind,
        "precision": {
            "parameters": " ".join(dtypes),
            "autocast": None,
            "matmul": matmul_precision(device.platform),
            "attention": None,
        }
        | dict(settings),
        "shape": {
            "vocab_size": None if embedding is None else embedding.shape[0],
            "num_hidden_layers": 1 + max(layers) if layers else None,
        },
        "config": None,
    }


def matmul_precision(platform: str) -> str:
    """To what JAX rounds the operands of float32 matmuls on a platform, with the current settings.

    >>> matmul_precision("cpu")
    'float32'
    """
    setting = getattr(jax.config, "jax_default_matmul_precision") or "default"  # noqa: B009, untyped
    if platform == "cpu" or setting in ("highest", "float32"):
        return "float32"
    if platform == "tpu":
        return "bfloat16_3x" if setting in ("high", "bfloat16_3x", "tensorfloat32") else "bfloat16"
    return "tf32"
