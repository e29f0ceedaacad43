"""Pretrain a small model on text files of your own, export it and sample from it.

    python examples/pretrain_on_your_text.py OUT 'texts/*.txt' [more files, directories or globs]

The steps are the commands that you would type; each prints what it does. OUT will have the tokenizer, the
tokens, the run and `model/`, a Hugging Face directory.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_jax.__main__ import main as llama_jax
from train.__main__ import main as train
from train.data.documents import read_documents

END = "<|endoftext|>"


def train_tokenizer(sources: list[str], out: Path, vocab_size: int = 2048) -> Path:
    """A byte-level BPE of the texts, as a directory that transformers reads too."""
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


def main(out: Path, sources: list[str], *extra: str) -> int:
    """Returns the exit code of the first command that fails, else 0. `extra` are flags of `run`."""
    tokenizer, tokens = train_tokenizer(sources, out / "tokenizer"), out / "tokens"
    run, model = out / "run", out / "model"
    commands = (
        (
            train,
            [
                "tokenize",
                *sources,
                "--tokenizer",
                str(tokenizer),
                "--out",
                str(tokens),
                "--validation-fraction",
                "0.1",
            ],
        ),
        (train, ["run", "--out", str(run), "--data", str(tokens), "--steps", "200", *extra]),
        (train, ["export", str(run), str(model)]),
        (
            llama_jax,
            ["generate", "--model", str(model), "--prompt", "The ", "--temperature", "0.8"],
        ),
    )
    for program, arguments in commands:
        if code := program(arguments):
            return code
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
