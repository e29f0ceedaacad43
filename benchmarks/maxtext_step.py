"""Compile MaxText's training step for TPUs; `benchmarks.pod` runs this in MaxText's own interpreter.

Writes OUT.hlo, the compiled program, and OUT.json, its memory and the time it took:
python maxtext_step.py OUT NAME=VALUE...
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any


def main(out: str, settings: list[str]) -> None:
    """What MaxText's `train_compile` does, keeping what it compiles."""
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train_compile

    compile_step = train_compile.jit_and_compile

    def keep(*arguments: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        compiled = compile_step(*arguments, **keywords)
        seconds = time.perf_counter() - begin
        Path(f"{out}.hlo").write_text(compiled.as_text())
        packages = "jax", "libtpu", "maxtext"
        result = {
            "peak": compiled.memory_analysis().peak_memory_in_bytes,
            "compile_seconds": seconds,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }
        Path(f"{out}.json").write_text(json.dumps(result))
        return compiled

    train_compile.jit_and_compile = keep
    defaults = Path(pyconfig.__file__).with_name("base.yml")
    train_compile.main(["train_compile", str(defaults), *settings])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
