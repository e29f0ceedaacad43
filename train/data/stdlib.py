"""Data that every machine has: the source code of Python's standard library, tokenized once and cached.

About 14 MB of text, one document per file. The tokenizer is a byte-level BPE trained on it.
"""

import hashlib
import json
import os
import platform
import sysconfig
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_jax.files.staging import staged_directory, write_text
from llama_jax.files.user_cache import cache_directory
from train.data.token_shards import INDEX_FILE, VERSION

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096

_VALIDATION_FRACTION = 0.02
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_tokens() -> Path:
    """The token directory (`train.data.token_shards`) of the running Python's standard library.

    It is cached in $XDG_CACHE_HOME/llama_jax (~/.cache/llama_jax), and made anew for another Python or
    other files. `transformers.AutoTokenizer` loads its tokenizer.

    Raises:
        ValueError: this Python ships no source files, only compiled or zipped ones.
        OSError: the cache cannot be written.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = _source_files(root)
    if not files:
        raise ValueError(f"{root}: this Python ships no .py sources; pass --data")
    cache = cache_directory("stdlib")
    # whatever else decides which tokens there are
    recipe = f"{VOCAB_SIZE}\0{_VALIDATION_FRACTION}\0{EOS}\0{VERSION}\0"
    digest = hashlib.sha256(recipe.encode())
    for path in files:
        digest.update(f"{path.relative_to(root)}\0".encode(errors="surrogateescape"))
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    directory = cache / f"stdlib-{platform.python_version()}-{digest.hexdigest()[:12]}"
    if (directory / INDEX_FILE).exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with staged_directory(directory, into_existing=False) as staging:
            _make(files, staging)
    except OSError:
        # another process may have made it meanwhile
        if not (directory / INDEX_FILE).exists():
            raise
    return directory


def _make(files: Iterable[Path], directory: Path) -> None:
    # every run comes by here, and needs neither them nor pyarrow
    from train.data.documents import read_documents
    from train.data.tokenize import tokenize

    with tempfile.TemporaryDirectory() as scratch:
        documents = Path(scratch, "documents.jsonl")
        with documents.open("w", encoding="utf-8") as file:
            for path in files:
                # a source file may declare another encoding
                with suppress(UnicodeDecodeError):
                    file.write(json.dumps({"text": path.read_bytes().decode()}) + "\n")
        _train_bpe(read_documents([documents])).save(f"{scratch}/tokenizer.json")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOS,  # as in GPT-2; other programs need one
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        write_text(Path(scratch, "tokenizer_config.json"), json.dumps(config, indent=2) + "\n")
        tokenize([documents], scratch, directory, validation_fraction=_VALIDATION_FRACTION)


def _train_bpe(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with VOCAB_SIZE ids, EOS first; it has all bytes, so it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _source_files(root: Path) -> list[Path]:
    """Every .py file of the standard library, sorted.

    Without installed packages, and without the tests, which are as large as the rest and often missing.
    """
    sources = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _EXCLUDED]
        sources += [Path(directory, name) for name in files if name.endswith(".py")]
    return sorted(sources)
