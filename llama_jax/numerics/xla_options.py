"""XLA's options for each platform: what a training step is compiled with, and how much of a GPU XLA takes.

They are `compiler_options` of `jax.jit` rather than XLA_FLAGS: a step planned without devices is then the
step that runs, and other programs of the process compile as JAX has them. What the user sets in XLA_FLAGS,
or for TPUs in LIBTPU_INIT_ARGS, is left alone. docs/nvidia.md has what each option does to a plan.
"""

import os
import re

import jax

from llama_jax.numerics.backend import target_platform

# Of a GPU's memory, what XLA takes at its start; the rest is for CUDA's context, NCCL and cuDNN. JAX's own
# default is 0.75; 0.9 is what NVIDIA sets for training (JAX-Toolbox, "Tips for High-Performance LLMs").
GPU_MEMORY_FRACTION = 0.9

# Of each device that XLA_FLAGS make of a CPU: see `reserve_host_threads`.
THREADS_PER_HOST_DEVICE = 4

Options = dict[str, str | int | bool]

# XLA_FLAGS take both names, `compiler_options` the one of their version
_OLD_PIPELINED, _PIPELINED = "xla_gpu_enable_pipelined_", "xla_gpu_pipeline_"


def _pipelined(collective: str) -> Options:
    """In a loop, start a collective during the iteration before its own."""
    if jax.__version_info__ < (0, 11, 1):
        return {_OLD_PIPELINED + collective: True}
    return {_PIPELINED + collective: "COLLECTIVE_PIPELINING_MODE_ON"}


STEP_OPTIONS: dict[str, Options] = {
    "cpu": {
        # XLA hoists the conversion of a bfloat16 array to float32 out of a loop that reads slices of it:
        # the residuals and the stacked weights would be held twice as large.
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    },
    "gpu": {
        # A layer's weights are gathered during the layer before it ("Tips for High-Performance LLMs"), and
        # in fewer, larger gathers than XLA's 30 MB makes: two for 8B. NVIDIA's threshold is 1 GiB, but
        # there is less to hide one gather of a complete layer behind.
        **_pipelined("all_gather"),
        "xla_gpu_all_gather_combine_threshold_bytes": 256 * 2**20,
    },
}

# Options of backends that `compiler_options` do not take.
_EXTRA_OPTIONS = "xla_backend_extra_options"

# For what runs once, such as initial parameters. LLVM's level 3 takes three times as long to compile those.
RUN_ONCE_OPTIONS: dict[str, Options] = {"cpu": {"xla_backend_optimization_level": 1}}

# In addition where hosts are linked by a network.
STEP_OPTIONS_ACROSS_HOSTS: dict[str, Options] = {
    "gpu": {
        # The gradients of a layer are reduced during the next one (ibid.). That holds them unreduced for
        # as long, which is not worth it where NVLink reduces them.
        **_pipelined("all_reduce"),
    },
}

# Scatters without atomics, kernels that sum in a fixed order, and no autotuning: the fastest kernel of one
# start need not be that of the next. XLA's other flag, xla_gpu_exclude_nondeterministic_ops, autotunes.
DETERMINISTIC: dict[str, Options] = {"gpu": {"xla_gpu_deterministic_ops": True}}


def step_compiler_options(
    platform: str | None = None, *, across_hosts: bool = False, deterministic: bool = False
) -> Options:
    """`compiler_options` of `jax.jit` for a training step.

    Args:
        platform: "cpu", "gpu" or "tpu"; default: `target_platform()`.
        across_hosts: the devices are those of several hosts.
        deterministic: the same program with the same inputs gives the same bits, also in another process
            on a GPU of the same kind. On a CPU or TPU it does so anyway.
    """
    platform = platform or target_platform()
    options = dict(STEP_OPTIONS.get(platform, {}))
    if across_hosts:
        options |= STEP_OPTIONS_ACROSS_HOSTS.get(platform, {})
    options = _not_set_by_user(options, platform)
    return options | (DETERMINISTIC.get(platform, {}) if deterministic else {})


def run_once_compiler_options(platform: str) -> Options:
    """`compiler_options` of `jax.jit` for a program that runs once: little time to compile."""
    return _not_set_by_user(RUN_ONCE_OPTIONS.get(platform, {}), platform)


def _not_set_by_user(options: Options, platform: str) -> Options:
    set_by_user = _names_in(os.environ.get("XLA_FLAGS", ""))
    if platform == "tpu":
        set_by_user |= _names_in(os.environ.get("LIBTPU_INIT_ARGS", ""))
    set_by_user |= {name.replace(_OLD_PIPELINED, _PIPELINED) for name in set_by_user}
    return {name: value for name, value in options.items() if name not in set_by_user}


def _names_in(flags: str) -> set[str]:
    """The names in flags such as "--xla_a=1 --xla_b"."""
    return set(re.findall(r"--(\w+)", flags))


def reserve_gpu_memory() -> None:
    """Let XLA take `GPU_MEMORY_FRACTION` of each GPU, unless the user has chosen a fraction.

    To be called before JAX looks for devices. Nothing but JAX's GPU backend reads the variable.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # JAX refuses both
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))


def leave_loops_rolled() -> None:
    """Let LLVM unroll no loops of XLA's on a CPU, unless the user has chosen options of this kind.

    Those loops are vectors already. A step compiles in a tenth to a half less time, and one in bfloat16
    takes no longer (docs/log.md). No option of `jax.jit` says so, and XLA reads this one when it first
    compiles: to be called before JAX looks for devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _EXTRA_OPTIONS not in _names_in(flags):
        rolled = f"--{_EXTRA_OPTIONS}=xla_cpu_disable_loop_unrolling=true"
        os.environ["XLA_FLAGS"] = f"{flags} {rolled}".strip()


def reserve_host_threads() -> None:
    """Let XLA have several threads for each device that XLA_FLAGS make of the CPU.

    By itself it has one. A collective blocks its thread, and XLA runs those that do not depend on each
    other at once: with a tensor axis, programs of eight devices stopped for ever, all threads waiting for
    one that had none, and XLA ended the process after 40 s. To be called before JAX looks for devices.
    """
    devices = re.search(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    if devices:  # XLA reads the number of threads from this variable
        os.environ.setdefault("NPROC", str(THREADS_PER_HOST_DEVICE * int(devices[1])))
