"""lm-evaluation-harness with our model class and with its own for PyTorch: the time of the same tasks.

Documents come from Python's language reference (`pydoc_data`): questions with four short answers, texts
with four endings, answers to generate after two examples, and texts to score. Each program runs in a
process of its own, with the model loaded before the clock starts; compilation counts. The second run of
ours finds the programs that the first one compiled.
"""

import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from benchmarks.isolated import measure
from benchmarks.real_checkpoint import real_checkpoint
from benchmarks.report import Report, show
from llama_jax.cli.arguments import positive, program_parser

_CHOICE = """output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]"""
TASKS = {
    "answers": _CHOICE,
    "endings": _CHOICE,
    "texts": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]""",
    "generation": """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["Question:"], max_gen_toks: 64}
metric_list: [{metric: exact_match}]""",
}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = program_parser("python -m benchmarks harness", "Time lm-evaluation-harness.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the demo's checkpoint")
    parser.add_argument("--documents", type=positive, default=300, metavar="N")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N")
    parser.add_argument("--rounds", type=positive, default=1, metavar="N")
    options = parser.parse_args(arguments)
    if options.model is not None:
        show(compare(options.model.resolve(), options))
        return
    with real_checkpoint() as directory:
        show(compare(directory, options))


def compare(model: Path, options: Any) -> Report:
    """Every program `options.rounds` times, alternating."""
    rows, values = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            save_tasks(Path(folder), options.documents)
            cache = str(Path(folder) / "compiled")
            runs = {
                name: measure(
                    "harness:evaluate",
                    kind,
                    str(model),
                    folder,
                    options.batch_size,
                    cache,
                    seconds=1800,
                )
                for name, kind in (
                    ("ours, first", "llama_jax"),
                    ("ours, again", "llama_jax"),
                    ("hf", "hf"),
                )
            }
        theirs = runs["hf"]
        for name, run in runs.items():
            ratios = [run[clock] / theirs[clock] for clock in ("wall", "cpu")]
            error, equal = difference(run["answers"], theirs["answers"])
            rows.append(
                [
                    name,
                    f"{run['wall']:.1f} s",
                    f"{ratios[0]:.2f}",
                    f"{run['cpu']:.1f} s",
                    f"{ratios[1]:.2f}",
                    f"{run['peak'] / 2**20:.0f} MiB",
                    f"{error:.1e}",
                    f"{equal:.0%}",
                ]
            )
            run.pop("answers")
            values.append({"name": name, "error": error, "equal": equal, **run})
            print(json.dumps(values[-1]), flush=True)
    return Report(
        f"{options.documents} documents, batches of {options.batch_size}, load {os.getloadavg()[0]:.1f}",
        ("", "wall", "/ hf", "processor", "/ hf", "peak RSS", "largest error", "same text"),
        rows,
        [],
        values,
    )


def evaluate(kind: str, model: str, folder: str, batch_size: int, cache: str) -> dict[str, Any]:
    """Seconds of `simple_evaluate` with a loaded model, and its answers.

    Args:
        kind: lm_eval's name of the model class.
        folder: of `save_tasks`.
        cache: directory of compiled programs.
    """
    os.environ |= {
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    import jax
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    import llama_jax.evaluation.harness  # noqa: F401 - registers the class

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    options: dict[str, Any] = {"pretrained": model, "dtype": "float32", "batch_size": batch_size}
    loaded = get_model(kind)(**options, **({"device": "cpu"} if kind == "hf" else {}))
    tasks = TaskManager(include_path=folder, include_defaults=False)
    wall, used = time.perf_counter(), _processor_seconds()
    results = lm_eval.simple_evaluate(
        loaded, tasks=list(TASKS), task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    wall, used = time.perf_counter() - wall, _processor_seconds() - used
    assert results is not None
    samples = results["samples"]
    return {
        "wall": wall,
        "cpu": used,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "answers": {task: [s["resps"] for s in samples[task]] for task in TASKS},
    }


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """The largest relative difference of a log-likelihood, and the share of equal generated texts."""
    pairs = [
        (float(np.ravel(a[0])[0]), float(np.ravel(b[0])[0]))
        for task in ("answers", "endings", "texts")
        for one, other in zip(ours[task], theirs[task], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    texts = list(zip(ours["generation"], theirs["generation"], strict=True))
    return (
        max(abs(a - b) / max(1, abs(b)) for a, b in pairs),
        sum(a == b for a, b in texts) / len(texts),
    )


def save_tasks(folder: Path, documents: int) -> None:
    """Write the tasks and their documents.

    Args:
        documents: with four answers, or half of them with endings; an eighth each of the other kinds.
    """
    rng = np.random.default_rng(0)
    passages = _passages(rng)

    def words(low: int, high: int) -> str:
        return " ".join(next(passages)[: int(rng.integers(low, high))])

    def question() -> str:
        return f"{words(10, 50)}\nQuestion: {words(6, 20)}?\nAnswer:"

    few = max(documents // 8, 2)
    texts = {
        "answers": [(question(), (1, 8)) for _ in range(documents - documents // 3)],
        "endings": [(words(30, 80), (8, 25)) for _ in range(documents // 3)],
        "texts": [(" ".join(words(40, 80) for _ in range(6)), (1, 2)) for _ in range(few)],
        "generation": [
            (
                f"{question()} {words(8, 20)}.\n\n{question()} {words(8, 20)}.\n\n{question()}",
                (1, 2),
            )
            for _ in range(few)
        ],
    }
    for task, settings in TASKS.items():
        lines = [
            json.dumps({"text": text, "choices": [words(*size) for _ in range(4)]})
            for text, size in texts[task]
        ]
        (folder / f"{task}.json").write_text("\n".join(lines))
        (folder / f"{task}.yaml").write_text(
            f"""task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / task}.json}}}}
test_split: test
num_fewshot: 0
{settings}
"""
        )


def _passages(rng: np.random.Generator) -> Iterator[list[str]]:
    """Places in the language reference, as words without end."""
    text = " ".join(re.sub(r"[^\w\s.,;'()-]", "", topic) for topic in topics.values())
    words = text.split()
    while True:
        start = int(rng.integers(len(words) - 100))
        yield words[start : start + 100]
