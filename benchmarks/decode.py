"""Greedy decoding and prefill against transformers and llama.cpp.

On a CPU: the real checkpoint, all programs alternating in one process. Ours in float32, bfloat16, 8 and 4
bits; transformers in float32; llama.cpp in its types where `LLAMA_CPP` is set (see `llama_cpp.py`).
Options choose some of them. On a GPU: the shapes of Llama 3.2 1B and Llama 3.1 8B in bfloat16, each
program in a process of its own; there transformers' static cache also brings torch.compile. No row ends
early. The time of a decoding step is (time of NEW tokens - time of the first token) / (NEW - 1). "of
bandwidth" is the time of reading as many bytes as a step reads of its weights over that of the step: by
torch in the same rounds, on a GPU by its data sheet.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import convert
from benchmarks.isolated import FailedError, measure
from benchmarks.llama_cpp import HOW_TO_GET_IT, TYPES, LlamaCpp, libraries
from benchmarks.real_checkpoint import real_checkpoint
from benchmarks.report import Report, show
from llama_jax import PRESETS, LlamaForCausalLM, quantize
from llama_jax.cli.arguments import positive, program_parser
from llama_jax.inspection.architecture import parameter_count
from llama_jax.quantization.model import weight_bytes
from parity_tests.harness.nvidia import device_kind
from train.hardware.chips import CHIPS

PROMPT, NEW, ROUNDS = 16, 128, 3
CPU_NEW, CPU_ROUNDS = 48, 2
BATCHES = (1, 8)
PREFILL = 1024
PASSES = 20  # of the reader: a single one is as short as a scheduler's time slice
PROGRAMS = ("ours", "HF, dynamic cache", "HF, static cache, torch.compile")

# of ids [batch, seq] and a number of new tokens; returns when the last one is computed
Generate = Callable[[np.ndarray, int], Any]
# seconds of "first", "all" and "prefill", by batch
Seconds = dict[str, float]


class Shape(NamedTuple):
    """Of a model with random weights, and what is generated."""

    preset: str
    new: int = NEW
    prefill: int | None = PREFILL
    batches: tuple[int, ...] = BATCHES


GPU = (Shape("llama-3.2-1b"), Shape("llama-3.1-8b"))
TINY = (Shape("tiny-4m", 4, 32),)


def main(arguments: Sequence[str] = ()) -> None:
    """Print the tables. The options are for a CPU."""
    parser = program_parser("python -m benchmarks decode", "Time greedy decoding and prefill.")
    parser.add_argument(
        "--programs", nargs="+", metavar="NAME", help='beginnings of rows, such as "ours, 8" or HF'
    )
    parser.add_argument("--batches", nargs="+", type=positive, default=BATCHES, metavar="N")
    parser.add_argument("--tokens", type=positive, default=CPU_NEW, metavar="N")
    parser.add_argument("--rounds", type=positive, default=CPU_ROUNDS, metavar="N")
    parser.add_argument("--no-prefill", action="store_true", help="leave out the long prompt")
    options = parser.parse_args(arguments)
    kind = device_kind()
    if kind is not None:
        for report in gpu_reports(kind):
            show(report)
        return
    show(cpu_report(options))


def cpu_report(options: Any) -> Report:
    """All programs in one process, on the real checkpoint."""
    import torch

    threads = torch.get_num_threads()
    prefill = None if options.no_prefill else PREFILL
    shape = Shape("", options.tokens, prefill, tuple(options.batches))
    with real_checkpoint() as directory, tempfile.TemporaryDirectory() as folder:
        ours = LlamaForCausalLM.from_pretrained(directory, dtype=jnp.float32)
        half = LlamaForCausalLM.from_pretrained(directory, dtype=jnp.bfloat16)
        theirs = hugging_face(directory)
        models = {
            "ours": ours,
            "ours, bfloat16": half,
            "ours, 8 bits": quantize(ours, bits=8),
            "ours, 4 bits": quantize(ours, bits=4),
        }
        sizes = {name: weight_bytes(model) for name, model in models.items()}
        peers: dict[str, Generate] = {
            name: partial(run_ours, model) for name, model in models.items()
        }
        for name, cache in (("HF, dynamic cache", None), ("HF, static cache", "static")):
            peers[name] = partial(run_theirs, theirs, cache, False)
            sizes[name] = sizes["ours"]
        files = llama_cpp_files(directory, Path(folder), threads, max(shape.batches))
        for name, (generate, size) in files.items():
            peers[name], sizes[name] = generate, size
    if options.programs is not None:
        peers = {
            name: peer for name, peer in peers.items() if name.startswith(tuple(options.programs))
        }
        if not peers:
            raise ValueError(f"--programs: found {options.programs}, expected some of {[*sizes]}")
    data = torch.ones(sizes["ours"] // 4)
    runs: dict[str, Callable[[], Any]] = {
        "read": lambda: [data.sum().item() for _ in range(PASSES)]
    }
    for name, generate in peers.items():
        tasks = tasks_of(generate, ours.config.vocab_size, shape)
        runs |= {f"{name}/{task}": run for task, run in tasks.items()}
    seconds = median_seconds(runs, options.rounds)
    by_program = {
        name: {key.split("/")[1]: s for key, s in seconds.items() if key.startswith(f"{name}/")}
        for name in peers
    }
    bandwidth = sizes["ours"] * PASSES / seconds["read"]
    title = (
        f"greedy decoding, {shape.new} tokens, {jax.devices()[0].device_kind}, {threads} threads, "
        f"median of {options.rounds}"
    )
    skipped = [] if files else [HOW_TO_GET_IT]
    return tabulate(title, by_program, skipped, shape, sizes, bandwidth)


def llama_cpp_files(
    directory: Path, folder: Path, threads: int, rows: int = max(BATCHES)
) -> dict[str, tuple[Generate, int]]:
    """llama.cpp with each of its types of the checkpoint, and the bytes of the file; {} without it."""
    found = libraries()
    if found is None:
        return {}
    program = LlamaCpp(found)
    source = folder / "source.gguf"
    convert.convert(directory, source, to="gguf")
    generators = {}
    for kind in TYPES:
        file = folder / f"{kind}.gguf"
        program.quantize(source, file, kind, threads)
        generate = program.generator(file, threads, rows, 2 * PREFILL)
        generators[f"llama.cpp, {kind}"] = generate, file.stat().st_size
    return generators


def gpu_reports(kind: str, shapes: tuple[Shape, ...] = GPU) -> Iterator[Report]:
    """A table for each shape; this process leaves the GPU alone."""
    chip = CHIPS.get(kind)
    for shape in shapes:
        by_program: dict[str, Seconds] = {}
        skipped = []
        for name in PROGRAMS:
            try:
                by_program[name] = measure("decode:time_alone", shape, name)
            except FailedError as error:
                skipped.append(f"{name}: {error}")
        config = PRESETS[shape.preset]
        # a step reads one row of an embedding that is not the head
        table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        size = 2 * (parameter_count(config) - table)
        title = (
            f"greedy decoding, {shape.preset}, {shape.new} tokens, bfloat16, {kind}, "
            f"median of {ROUNDS}"
        )
        bandwidth = chip.memory_bandwidth if chip else None
        sizes = dict.fromkeys(PROGRAMS, size)
        yield tabulate(title, by_program, skipped, shape, sizes, bandwidth)


def tabulate(
    title: str,
    by_program: dict[str, Seconds],
    skipped: list[str],
    shape: Shape,
    sizes: dict[str, int],
    bandwidth: float | None,
) -> Report:
    """Speed of every program, beside the faster of transformers'; `sizes` are the bytes of the weights."""
    rows, values = [], []
    for batch in shape.batches:
        steps = {
            name: (seconds[f"all {batch}"] - seconds[f"first {batch}"]) / (shape.new - 1)
            for name, seconds in by_program.items()
        }
        theirs = [step for name, step in steps.items() if name.startswith("HF")]
        for name, step in steps.items():
            seconds = by_program[name]
            prefill = seconds.get("prefill") if batch == 1 else None
            share = sizes[name] / bandwidth / step if bandwidth and batch == 1 else None
            rows.append(
                [
                    name,
                    str(batch),
                    f"{batch / step:.1f}",
                    f"{min(theirs) / step:.2f}" if theirs else "",
                    f"{share:.0%}" if share else "",
                    f"{seconds[f'first {batch}']:.3f} s",
                    f"{prefill:.3f} s" if prefill else "",
                ]
            )
            values.append(
                {"name": name, "batch": batch, "tokens_per_second": batch / step}
                | {"of_bandwidth": share, "prefill_seconds": prefill}
            )
    columns = ("", "batch", "tokens/s", "/ faster HF", "of bandwidth", "first token")
    notes = [f"skipped: {line}" for line in skipped]
    if bandwidth:
        weights = ", ".join(f"{name} {sizes[name] / 1e6:.0f} MB" for name in by_program)
        notes.insert(0, f"bandwidth {bandwidth / 1e9:.1f} GB/s; weights: {weights}")
    return Report(title, (*columns, f"prefill {shape.prefill}"), rows, notes, values)


def time_alone(shape: list[Any], name: str) -> Seconds:
    """One program with random weights, the only one in this process."""
    sizes = Shape(*shape)
    config = PRESETS[sizes.preset]
    if name == "ours":
        model = LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        generate: Generate = partial(run_ours, model)
    else:
        import torch
        import transformers

        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            settings = transformers.LlamaConfig(**config.to_dict())
            theirs = transformers.LlamaForCausalLM(settings).to(torch.bfloat16).eval()
        compiled = "compile" in name
        generate = partial(run_theirs, theirs, "static" if compiled else None, compiled)
    return median_seconds(tasks_of(generate, config.vocab_size, sizes))


def tasks_of(generate: Generate, vocab: int, shape: Shape) -> dict[str, Callable[[], Any]]:
    """Of every batch the first token and all; of one row a long prompt."""
    rng = np.random.default_rng(0)
    tasks: dict[str, Callable[[], Any]] = {}
    for batch in shape.batches:
        ids = rng.integers(3, vocab, (batch, PROMPT))
        tasks[f"first {batch}"] = partial(generate, ids, 1)
        tasks[f"all {batch}"] = partial(generate, ids, shape.new)
    if shape.prefill is not None:
        tasks["prefill"] = partial(generate, rng.integers(3, vocab, (1, shape.prefill)), 1)
    return tasks


def hugging_face(directory: Any) -> Any:
    import torch
    import transformers

    load = transformers.LlamaForCausalLM.from_pretrained
    return load(directory, dtype=torch.float32).eval()


def run_ours(model: LlamaForCausalLM, ids: np.ndarray, new: int) -> Any:
    return jax.block_until_ready(
        model.generate(ids, max_new_tokens=new, eos_token_id=(), do_sample=False)
    )


def run_theirs(model: Any, cache: str | None, compiled: bool, ids: np.ndarray, new: int) -> Any:
    """transformers' `generate`; on a GPU a static cache brings torch.compile with it."""
    import torch

    rows = torch.from_numpy(ids).to(model.device)
    options = {} if cache is None else {"cache_implementation": cache}
    with torch.no_grad():
        out = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            disable_compile=not compiled,
            **options,
        )
    return out.cpu()


def median_seconds(runs: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, after a round that compiles; alternating, so that drift affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}
