"""What a command says where the machine, and not its user, is at fault."""

import jax

# a command that catches these prints `failure_line`
FAILURES = (MemoryError, OverflowError, jax.errors.JaxRuntimeError)


def failure_line(error: BaseException) -> str:
    """One line: that memory ran out only where it did, else what the backend said."""
    said = next(iter(str(error).split("\n")), "").strip()
    if isinstance(error, MemoryError) or said.startswith("RESOURCE_EXHAUSTED"):
        return "not enough memory" + (f": {said}" if said else "")
    if isinstance(error, OverflowError):
        return f"a size out of range: {said}"
    return f"JAX's backend failed: {said or type(error).__name__}"
