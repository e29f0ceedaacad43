"""Pretrain a small model on your own text files, export it and sample from it.

    python examples/pretrain_on_your_text.py OUT 'texts/*.txt' [more files, directories or globs]

It trains a tokenizer and then runs the commands that you would type. OUT holds the tokenizer, the tokens,
the run, and the result in `model/`, a Hugging Face directory.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_jax.__main__ import main as llama_jax
from train.__main__ import main as train
from train.data.documents import read_documents

END = "<|endoftext|>"


def train_tokenizer(sources: list[str], out: Path, vocab_size: int = 2048) -> Path:
    """Train a byte-level BPE on the texts and return its directory, which transformers reads too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_documents(sources), trainer)
    out.mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer.json"))
    return out


def main(out: Path, sources: list[str], *flags: str) -> int:
    """Return the exit code of the first command that fails, else 0. `flags` go to `train run`."""
    tokenizer = train_tokenizer(sources, out / "tokenizer")
    tokens, run, model = out / "tokens", out / "run", out / "model"
    held_out = ("--validation-fraction", 0.1)
    commands = (
        (train, "tokenize", *sources, "--tokenizer", tokenizer, "--out", tokens, *held_out),
        (train, "run", "--out", run, "--data", tokens, "--steps", 200, *flags),
        (train, "export", run, model),
        (llama_jax, "generate", "--model", model, "--prompt", "The ", "--temperature", 0.8),
    )
    for program, *arguments in commands:
        if exit_code := program([str(argument) for argument in arguments]):
            return exit_code
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
