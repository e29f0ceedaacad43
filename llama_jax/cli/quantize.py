"""`python -m llama_jax quantize`: a directory whose weights take 8 or 4 bits."""

import argparse
from pathlib import Path
from typing import Any

from llama_jax.cli.arguments import positive
from llama_jax.formatting import printable

_WINDOW = 512  # tokens of the text that are compared at a time


def add_quantize(commands: Any, dtypes: tuple[str, ...]) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("quantize", help="hold the weights in 8 or 4 bits")
    parser.set_defaults(command=quantize)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face's, Orbax's or a run"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="must not exist")
    parser.add_argument("--bits", type=int, default=8, metavar="N", help="8 or 4")
    parser.add_argument(
        "--group-size",
        type=positive,
        metavar="N",
        help="columns that share a scale; default: a whole row in 8 bits, 128 in 4",
    )
    parser.add_argument("--dtype", choices=dtypes, help="of all else; default: as stored")
    parser.add_argument(
        "--text", type=Path, metavar="F", help="a text, UTF-8, on which both are compared"
    )


def quantize(options: argparse.Namespace) -> None:
    """Quantise, write and say what it saved and what it cost. Raises ValueError."""
    from llama_jax.evaluation.divergence import divergence
    from llama_jax.files.staging import staged_directory
    from llama_jax.load import companions_directory, load_model, tokenizer_directory
    from llama_jax.quantization import model as quantization
    from llama_jax.text.companions import copy_companions
    from llama_jax.text.lines import read_text
    from llama_jax.text.tokenizer import load_tokenizer

    if options.out.exists():
        raise ValueError(f"--out: {options.out} exists, expected it to be absent")
    ids = []
    if options.text is not None:
        ids = load_tokenizer(tokenizer_directory(options.model)).encode(read_text(options.text)).ids
    model = load_model(options.model, options.dtype)
    quantized = quantization.quantize(model, options.bits, options.group_size)
    if ids:  # before anything is written: a text may be too short
        window = min(_WINDOW, model.config.max_position_embeddings)
        found = divergence(model, quantized, ids, window=window)
    with staged_directory(options.out, into_existing=False) as staging:
        quantized.save_pretrained(staging)
        copy_companions(companions_directory(options.model), staging)
    before, after = map(quantization.weight_bytes, (model, quantized))
    out = printable(str(options.out))
    print(f"{out}: {before} bytes of weights before, {after} after, {after / before:.1%}")
    for bits, count in sorted(quantization.matrices_by_bits(quantized).items()):
        print(f"{count} matrices in {bits} bits")
    if ids:
        change = found.perplexity / found.reference_perplexity - 1
        print(
            f"over {found.tokens} tokens: mean KL {found.kl:.3g}, perplexity "
            f"{found.reference_perplexity:.5g} before, {found.perplexity:.5g} after, {change:+.2%}"
        )
