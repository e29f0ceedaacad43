"""Several processes in one run."""

import jax

from llama_jax.formatting import first_line
from train.options import DistributedOptions


def has_other_processes(options: DistributedOptions) -> bool:
    """Whether the run is one of several processes, as far as its options say."""
    return options.enabled or options.coordinator is not None


def join_processes(options: DistributedOptions) -> None:
    """Connect to the other processes of the run, if there are any. Raises ValueError where that fails."""
    if not has_other_processes(options):
        return
    # before the backend starts; other platforms have collectives of their own
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(options.coordinator, options.processes, options.process_id)
    except Exception as error:
        raise ValueError(f"distributed: cannot be initialized ({first_line(error)})") from None
