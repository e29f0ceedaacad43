"""How the layers of a run pass through the stages of its mesh."""

from collections.abc import Iterable, Mapping

from llama_jax.config import LlamaConfig
from llama_jax.models.pipeline import Pipeline
from llama_jax.sharding import STAGE_AXIS
from train.options import MeshOptions
from train.program.mesh import divisors

# Parts of a batch for each stage: an idle share of at most (stages - 1) / (5 stages - 1).
_MICRO_BATCHES_OF_STAGE = 4


def find_pipeline(
    options: MeshOptions, config: LlamaConfig, sizes: Mapping[str, int], rows: int
) -> Pipeline | None:
    """How the layers run over the stages of a mesh of `sizes`; None for a single stage.

    Args:
        rows: of a micro-batch, a multiple of stage x data x fsdp.

    Raises:
        ValueError: options that do not divide the layers or the rows, or that need a stage axis.
    """
    stages, layers, count = sizes[STAGE_AXIS], config.num_hidden_layers, options.stage_micro_batches
    repeats = options.stage_repeats
    if stages == 1:
        for name, value, unused in (("micro-batches", count, None), ("repeats", repeats, 1)):
            if value != unused:
                raise ValueError(
                    f"mesh.stage-{name}: found {value} with --mesh.stage 1, expected more stages or "
                    "none of it"
                )
        return None
    if layers % stages:
        raise ValueError(
            f"mesh.stage: found {stages}, expected a divisor of the {layers} layers: one of "
            f"{_listed(divisors(layers))}"
        )
    if layers // stages % repeats:
        raise ValueError(
            f"mesh.stage-repeats: found {repeats}, expected a divisor of the {layers // stages} layers "
            f"of a stage: one of {_listed(divisors(layers // stages))}"
        )
    parts = rows // (sizes["data"] * sizes["fsdp"])
    possible = [n for n in range(stages, parts + 1, stages) if parts % n == 0]
    if count is None:
        count = max(n for n in possible if n <= _MICRO_BATCHES_OF_STAGE * stages)
    if count not in possible:
        raise ValueError(
            f"mesh.stage-micro-batches: found {count}, expected a multiple of {stages} stages that divides "
            f"the {parts} rows that a micro-batch has for each of data x fsdp: one of "
            f"{_listed(possible)}"
        )
    return Pipeline(count, repeats)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
