"""Continue training a Hugging Face checkpoint on your own text files.

    python examples/continue_from_checkpoint.py HF_DIR OUT 'texts/*.txt' [more files, directories or globs]

The text is tokenized with the checkpoint's tokenizer. The result is OUT/model, a Hugging Face directory.
The loss on held-out text is printed for the checkpoint and for the result.
"""

import sys
from pathlib import Path

from train.__main__ import main as train


def main(checkpoint: Path, out: Path, sources: list[str], *flags: str) -> int:
    """Return the exit code of the first command that fails, else 0. `flags` go to `train run`."""
    tokens, run, model = out / "tokens", out / "run", out / "model"
    options = ("--model.init-from", checkpoint, "--optimizer.learning-rate", "1e-4", "--steps", 50)
    held_out = ("--validation-fraction", 0.1)
    commands = (
        ("tokenize", *sources, "--tokenizer", checkpoint, "--out", tokens, *held_out),
        ("run", "--out", run, "--data", tokens, *options, *flags),
        ("export", run, model),
        ("eval", checkpoint, "--data", tokens),
        ("eval", model, "--data", tokens),
    )
    for command in commands:
        arguments = [str(argument) for argument in command]
        print("$ python -m train", *arguments)
        if exit_code := train(arguments):
            return exit_code
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
