"""`python -m llama_jax score`: the log-probability of each token of a text."""

import argparse
import math
from pathlib import Path
from typing import Any

from llama_jax.cli.arguments import DTYPES, Parser, add_model, positive, some_text
from llama_jax.cli.compiled_programs import add_cache, keep_compiled_programs
from llama_jax.cli.program import json_line
from llama_jax.text.lines import read_lines


def add_score(program: Parser) -> None:
    """Add the command to its program."""
    parser = program.add_command(
        "score", score, help="compute the log-probability of each token of a text"
    )
    add_model(parser)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--text",
        type=some_text,
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="one or more texts to score",
    )
    texts.add_argument("--file", type=Path, metavar="FILE", help="UTF-8 file, one text per line")
    parser.add_argument(
        "--context",
        type=some_text,
        metavar="TEXT",
        help="prefix for every text; not scored itself",
    )
    parser.add_argument(
        "--rolling",
        action="store_true",
        help="score texts of any length in windows, each of which begins with the bos token",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="texts or windows in a batch"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; default: as stored")
    parser.add_argument("--json", action="store_true", help="print a JSON object per line")
    add_cache(parser)


def score(options: argparse.Namespace) -> None:
    """Score the texts and print them. Raises ValueError."""
    from llama_jax.evaluation.scoring import (
        encode_pair,
        loglikelihood,
        loglikelihood_rolling,
        prefix_token,
    )
    from llama_jax.load import load_config, load_model, tokenizer_directory
    from llama_jax.text.detokenize import token_texts
    from llama_jax.text.encode import encode_text
    from llama_jax.text.tokenizer import load_tokenizer, special_tokens
    from llama_jax.text.tokenizer_files import read_files

    if options.rolling and options.context is not None:
        raise ValueError("--rolling and --context exclude each other")
    keep_compiled_programs(options)
    texts = options.text or _lines(options.file)
    config = load_config(options.model)
    home = tokenizer_directory(options.model)
    limit = None if options.rolling else config.max_position_embeddings
    tokenizer = load_tokenizer(home)
    prefix = prefix_token(config, tokenizer, special_tokens(read_files(home)))
    if options.context is not None and not encode_text(tokenizer, options.context).ids:
        raise ValueError("--context: tokenizes to no tokens, expected at least one")
    pairs = []
    for number, text in enumerate(texts, 1):
        if options.context is None:
            before, ids = encode_text(tokenizer, text)
            both = before + ids
            # the rolling windows begin with a bos of their own
            pair = ([], ids) if options.rolling else (both[:1], both[1:])
        else:
            pair = encode_pair(tokenizer, options.context, text, prefix_token_id=prefix)
        _require_tokens(number, pair, limit, options.context)
        pairs.append(pair)
    model = load_model(options.model, options.dtype)
    if options.rolling:
        sequences = [ids for _, ids in pairs]
        scores = loglikelihood_rolling(
            model, sequences, prefix_token_id=prefix, batch_size=options.batch_size
        )
    else:
        scores = loglikelihood(model, pairs, batch_size=options.batch_size)
    for text, (_, ids), scored in zip(texts, pairs, scores, strict=True):
        tokens = token_texts(tokenizer, ids)
        if options.json:
            row = {
                "text": text,
                "context": options.context,
                "ids": ids,
                "tokens": tokens,
                "log_probs": scored.log_probs.tolist(),
                "log_prob": scored.total,
                "is_greedy": scored.is_greedy,
            }
            print(json_line(row))
        else:
            _show(tokens, scored)


def _require_tokens(
    number: int, pair: tuple[list[int], list[int]], limit: int | None, context: str | None
) -> None:
    """Raise ValueError unless there is something to score, in `limit` inputs; None is no limit."""
    before, scored = pair
    if context is not None and not before:
        raise ValueError(
            f"text {number}: its first token spans the context, and there is no bos or eos to begin "
            "with; end --context at a word"
        )
    if before and not scored and context is None:
        raise ValueError(
            f"text {number}: it is a single token, with nothing before it; use --context or --rolling"
        )
    if not scored:
        raise ValueError(f"text {number}: tokenizes to no tokens, expected at least one")
    length = len(before) + len(scored)
    if limit is not None and length - 1 > limit:
        raise ValueError(
            f"text {number}: found {length} tokens, expected at most {limit + 1} for "
            f"max_position_embeddings={limit}, or --rolling"
        )


def _lines(path: Path) -> list[str]:
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"{path}: the file is empty, expected one text per line")
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1}: the line is empty")
    return lines


def _show(tokens: list[str], scored: Any) -> None:
    """Print a table of one text: its tokens and their log-probabilities, then the total."""
    from rich.table import Table

    from llama_jax.formatting import console

    table = Table()
    table.add_column("token", no_wrap=True, max_width=40)
    table.add_column("log-prob", justify="right")
    table.add_column("most likely")
    for token, log_prob, greedy in zip(tokens, scored.log_probs, scored.greedy, strict=True):
        shown = repr(token)[1:-1]  # for spaces and line ends
        table.add_row(shown, f"{log_prob:.4f}", "yes" if greedy else "")
    out = console()
    out.print(table)
    count = len(tokens)
    perplexity = math.exp(min(-scored.total / count, 700.0))
    out.print(
        f"log-prob {scored.total:.4f} over {count} tokens, perplexity {perplexity:.4g}, "
        f"greedy: {'yes' if scored.is_greedy else 'no'}",
    )
