"""Continue the training of a Hugging Face checkpoint on text files of your own.

    python examples/continue_from_checkpoint.py HF_DIR OUT 'texts/*.txt' [more files, directories or globs]

The text is tokenized with the checkpoint's own tokenizer. OUT/model is a Hugging Face directory; its loss
on held-out text is printed beside that of the checkpoint.
"""

import sys
from pathlib import Path

from train.__main__ import main as train


def main(checkpoint: Path, out: Path, sources: list[str], *extra: str) -> int:
    """Returns the exit code of the first command that fails, else 0. `extra` are flags of `run`."""
    tokens, run, model = str(out / "tokens"), str(out / "run"), str(out / "model")
    commands = (
        [
            "tokenize",
            *sources,
            "--tokenizer",
            str(checkpoint),
            "--out",
            tokens,
            "--validation-fraction",
            "0.1",
        ],
        [
            "run",
            "--out",
            run,
            "--data",
            tokens,
            "--model.init-from",
            str(checkpoint),
            "--optimizer.learning-rate",
            "1e-4",
            "--steps",
            "50",
            *extra,
        ],
        ["export", run, model],
        ["eval", str(checkpoint), "--data", tokens],
        ["eval", model, "--data", tokens],
    )
    for arguments in commands:
        print("$ python -m train", *arguments)
        if code := train(arguments):
            return code
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
