"""`python -m llama_jax generate|info|mask|score`: the library from a shell."""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llama_jax.arguments import OneLineParser, positive
from llama_jax.mask_command import add_mask
from llama_jax.score_command import add_score

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. A user's mistake is one line on stderr and exit code 2."""
    try:
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], None] = options.command
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            command(options)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
    except (MemoryError, OverflowError, jax.errors.JaxRuntimeError) as error:
        message = f"not enough memory, or a size out of range: {str(error).splitlines()[0]}"
    else:
        return 0
    print(f"error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m llama_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt, greedily")
    generate.set_defaults(command=_generate)
    generate.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face directory")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=positive, default=64, metavar="N")
    generate.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    generate.add_argument(
        "--cache-size",
        type=positive,
        metavar="N",
        help="slots of the key/value cache; default: prompt and new tokens",
    )

    info = commands.add_parser("info", help="the architecture: tensors, parameters, FLOPs, bytes")
    info.set_defaults(command=_info)
    info.add_argument("model", metavar="PRESET|DIR")
    info.add_argument("--batch", type=positive, default=1, metavar="B")
    info.add_argument(
        "--seq", type=positive, metavar="S", help="default: min(max_position_embeddings, 8192)"
    )
    add_mask(commands)
    add_score(commands, DTYPES)
    return parser


def _generate(options: argparse.Namespace) -> None:
    import numpy as np

    from llama_jax import LlamaForCausalLM
    from llama_jax.tokenizer import load_tokenizer

    directory = Path(options.model)
    if directory.is_file():
        raise ValueError(
            f"{directory}: found a file, expected a Hugging Face directory; for a GGUF file: "
            f"python -m convert {directory} DIR"
        )
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory, expected a Hugging Face checkpoint")
    tokenizer = load_tokenizer(directory)
    try:
        prompt = tokenizer.encode(options.prompt.encode().decode()).ids
    except UnicodeEncodeError:
        raise ValueError("--prompt: found bytes that are not UTF-8, expected text") from None
    if not prompt:
        raise ValueError("--prompt: found no tokens, expected at least one")
    model = LlamaForCausalLM.from_pretrained(directory, dtype=options.dtype)
    ids = np.asarray([prompt], np.int32)
    begin = time.perf_counter()
    tokens = np.asarray(
        model.generate(
            ids, max_new_tokens=options.max_new_tokens, cache_capacity=options.cache_size
        )
    )[0]
    seconds = time.perf_counter() - begin
    print(tokenizer.decode(tokens.tolist()))
    new = len(tokens) - ids.shape[1]
    print(f"{new} tokens in {seconds:.2f} s, compilation included", file=sys.stderr)


def _info(options: argparse.Namespace) -> None:
    from llama_jax import PRESETS, LlamaConfig
    from llama_jax.info import show

    if options.model in PRESETS:
        config = PRESETS[options.model]
    elif Path(options.model).is_dir():
        config = LlamaConfig.from_pretrained(options.model)
    else:
        raise ValueError(
            f"{options.model}: neither a directory nor a preset, expected one of "
            f"{', '.join(PRESETS)}"
        )
    seq = options.seq or min(config.max_position_embeddings, 8192)
    show(options.model, config, batch=options.batch, seq=seq)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
