"""`python -m llama_jax mask`: which token sees which."""

import argparse
from pathlib import Path
from typing import Any

from llama_jax.cli.arguments import positive, some_text

MOST_TOKENS = 4096  # a picture has the square of it


def add_mask(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("mask", help="which token sees which, as a picture")
    parser.set_defaults(command=mask)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face's, Orbax's or a run"
    )
    parser.add_argument(
        "--text",
        type=some_text,
        nargs="+",
        action="extend",
        required=True,
        metavar="TEXT",
        help="several are a padded batch",
    )
    parser.add_argument("--packed", action="store_true", help="or packed into one row")
    parser.add_argument("--padding-side", choices=("left", "right"), default="right")
    parser.add_argument(
        "--cached",
        type=positive,
        default=0,
        metavar="N",
        help="the first N tokens of a row are in the key/value cache",
    )
    parser.add_argument("--png", type=Path, metavar="F", help="also draw it into a file")


def mask(options: argparse.Namespace) -> None:
    """Print the pictures and, where asked for, write them as PNG. Raises ValueError."""
    from llama_jax.formatting import console
    from llama_jax.inspection.mask_picture import draw_png, draw_text, mask_pictures
    from llama_jax.load import load_config, tokenizer_directory
    from llama_jax.text.detokenize import token_texts
    from llama_jax.text.tokenizer import load_tokenizer

    positions = load_config(options.model).max_position_embeddings
    tokenizer = load_tokenizer(tokenizer_directory(options.model))
    texts = []
    for number, text in enumerate(options.text, 1):
        ids = tokenizer.encode(text).ids
        if not ids:
            raise ValueError(f"text {number}: found no tokens, expected at least one")
        texts.append(token_texts(tokenizer, ids))
    length = sum(map(len, texts)) if options.packed else max(map(len, texts))
    if length > min(positions, MOST_TOKENS):
        raise ValueError(
            f"--text: found {length} tokens a row, expected at most {min(positions, MOST_TOKENS)}"
        )
    pictures = mask_pictures(
        texts,
        packed=options.packed,
        padding_side=options.padding_side,
        cached=options.cached,
    )
    if options.png is not None:
        draw_png(pictures, options.png)
    out = console()
    for picture in pictures:
        out.print(draw_text(picture, out.width), no_wrap=True)
