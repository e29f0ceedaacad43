"""`python -m llama_jax mask`: which tokens each token attends to, as a picture."""

import argparse
from pathlib import Path

from llama_jax.cli.arguments import Parser, add_model, option_names, positive, some_text

MOST_TOKENS = 4096  # a picture has the square of it


def add_mask(program: Parser) -> None:
    """Add the command to its program."""
    parser = program.add_command(
        "mask", mask, help="draw which tokens of a text each token attends to"
    )
    add_model(parser)
    parser.add_argument(
        "--text",
        type=some_text,
        nargs="+",
        action="extend",
        required=True,
        metavar="TEXT",
        help="one text, or several as a padded batch",
    )
    parser.add_argument("--packed", action="store_true", help="pack the texts into one row instead")
    parser.add_argument(
        "--padding-side",
        choices=("left", "right"),
        default="right",
        help="where shorter texts are padded",
    )
    parser.add_argument(
        "--cached",
        type=positive,
        default=0,
        metavar="N",
        help="treat the first N tokens as already cached",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="also save the picture as PNG")


def mask(options: argparse.Namespace) -> None:
    """Print the pictures and, with `--png`, save them. Raises ValueError."""
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
            raise ValueError(f"text {number}: tokenizes to no tokens, expected at least one")
        texts.append(token_texts(tokenizer, ids))
    length = sum(map(len, texts)) if options.packed else max(map(len, texts))
    if length > min(positions, MOST_TOKENS):
        raise ValueError(
            f"--text: found {length} tokens in a row, expected at most {min(positions, MOST_TOKENS)}"
        )
    with option_names(options):
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
