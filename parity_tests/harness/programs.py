"""Run the oracle, Hugging Face's model and ours, with results of the same form.

Each returns `Numbers`, numpy arrays by name: "logits" (for question answering, start and end side by side),
"loss" if there are labels, and "grad NAME" for every parameter by its Hugging Face name. The gradient is of
the loss or, without labels, of a projection of the logits that gives each a different cotangent.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import PreTrainedModel

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.checkpoints import huggingface
from parity_tests.harness.cases import hf_inputs, torch_inputs
from parity_tests.harness.compilation import compiler_options
from parity_tests.reference.oracle import oracle

Config = Mapping[str, Any]
Weights = Mapping[str, torch.Tensor]
Inputs = Mapping[str, Any]
Numbers = dict[str, np.ndarray]


def _slope(xp: Any, logits: Any) -> Any:
    """Weights from -1 to 1 for the projection of the logits; xp is torch or jax.numpy."""
    size = int(np.prod(logits.shape))
    return xp.linspace(-1.0, 1.0, size, dtype=logits.dtype).reshape(logits.shape)


def _logits(xp: Any, out: Any) -> Any:
    """The logits of an output; start and end logits side by side. xp is torch or jax.numpy."""
    return (
        out.logits if hasattr(out, "logits") else xp.stack([out.start_logits, out.end_logits], -1)
    )


# torch -------------------------------------------------------------------------------------------


def torch_numbers(out: Any, parameters: Mapping[str, torch.Tensor]) -> Numbers:
    """The numbers of a torch model's output. Parameters without influence have gradients of zero."""
    logits = _logits(torch, out)
    results = {"logits": logits}
    scalar = (logits * _slope(torch, logits)).mean()
    if out.loss is not None:
        results["loss"] = scalar = out.loss
    grads = torch.autograd.grad(scalar, list(parameters.values()), materialize_grads=True)
    results |= {f"grad {name}": g for name, g in zip(parameters, grads, strict=True)}
    # numpy has no bfloat16, and float32 has all of its values
    wide = {name: v.float() if v.dtype == torch.bfloat16 else v for name, v in results.items()}
    return {name: value.detach().numpy() for name, value in wide.items()}


def oracle_numbers(
    config: Config,
    weights: Weights,
    inputs: Inputs,
    dtype: torch.dtype = torch.float64,
    program: Callable[..., Any] = oracle,
) -> Numbers:
    parameters = {name: w.to(dtype).requires_grad_() for name, w in weights.items()}
    return torch_numbers(
        program(config, parameters, **torch_inputs(inputs), dtype=dtype), parameters
    )


def hf_numbers(model: PreTrainedModel, inputs: Inputs) -> Numbers:
    attention = model.config._attn_implementation
    return torch_numbers(model(**hf_inputs(inputs, attention)), dict(model.named_parameters()))


# JAX ---------------------------------------------------------------------------------------------


def our_model(
    config: Config, weights: Weights, dtype: Any, model_class: type[Any] = LlamaForCausalLM
) -> Any:
    """Our model with these weights. float64 needs `jax.enable_x64(True)` around the call."""
    tensors = {name: weight.detach().numpy() for name, weight in weights.items()}
    return huggingface.from_hf_tensors(model_class, LlamaConfig.from_dict(config), tensors, dtype)


def our_inputs(inputs: Inputs, dtype: Any) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """The arrays of the inputs as JAX arrays (int32, or `dtype`), and their plain ints."""
    arrays = {
        name: jnp.asarray(value, dtype if value.dtype.kind == "f" else jnp.int32)
        for name, value in inputs.items()
        if isinstance(value, np.ndarray)
    }
    return arrays, {name: value for name, value in inputs.items() if isinstance(value, int)}


def compiled(
    ints: Mapping[str, int], options: Mapping[str, Any] | None = None
) -> Callable[..., tuple[dict[str, jax.Array], Any]]:
    """The jitted `(model, arrays) -> ({"logits", "loss"}, gradient)`, with `ints` fixed."""

    def scalar(model: Any, arrays: dict[str, jax.Array]) -> Any:
        out = model(**arrays, **ints)
        logits = _logits(jnp, out)
        if out.loss is not None:
            return out.loss, {"logits": logits, "loss": out.loss}
        return (logits * _slope(jnp, logits)).mean(), {"logits": logits}

    def both(model: Any, arrays: dict[str, jax.Array]) -> Any:
        (_, results), gradient = jax.value_and_grad(scalar, has_aux=True)(model, arrays)
        return results, gradient

    return jax.jit(both, compiler_options=dict(options or {}))


def our_numbers(model: Any, inputs: Inputs, run: Callable[..., Any] | None = None) -> Numbers:
    """The numbers of our model. `run` is what `compiled` returned, to compile once for many inputs."""
    arrays, ints = our_inputs(inputs, model.dtype)
    run = run or compiled(ints, compiler_options(model.dtype))
    results, gradient = run(model, arrays)
    grads = {
        f"grad {name}": np.asarray(array) for name, array in huggingface.to_hf_tensors(gradient)
    }
    return {name: np.asarray(value) for name, value in results.items()} | grads
