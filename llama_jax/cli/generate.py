"""`python -m llama_jax generate`: one prompt is printed token by token, several as they end."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from llama_jax.cli.arguments import Parser, add_model
from llama_jax.cli.compiled_programs import keep_compiled_programs
from llama_jax.cli.generation import (
    add_generation,
    encode,
    load_with_tokenizer,
    new_tokens,
    sampling_choices,
    stop_ids,
    write,
)
from llama_jax.cli.program import json_line
from llama_jax.cli.startup import with_garbage_collection, without_garbage_collection
from llama_jax.text.detokenize import TextStream


def add_generate(program: Parser) -> None:
    """Add the command to its program."""
    parser = program.add_command("generate", _generate, help="continue one or several prompts")
    add_model(parser)
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="text to continue; may be given several times, for a batch, which is printed as rows end",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object per prompt")
    add_generation(parser, max_new_tokens=64)


class _Row:
    """A prompt and its continuation so far."""

    def __init__(self, tokenizer: Any, text: str, stops: list[str]) -> None:
        self.prompt = text
        self.prompt_ids = encode(tokenizer, text, "--prompt")
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._stream = TextStream(tokenizer, self.prompt_ids, stops)

    def push(self, token: int, *, ends: bool) -> str:
        """Take a token; return the text that it makes certain."""
        self.ids.append(token)
        part = self._stream.finish(token) if ends else self._stream.push(token)
        if ends or self._stream.stopped:
            self.finish_reason = "stop"
        self.text += part
        return part

    def finish(self) -> str:
        """Return the rest of the text: there are no more tokens."""
        part = self._stream.finish()
        self.finish_reason = "stop" if self._stream.stopped else "length"
        self.text += part
        return part

    def to_json(self, index: int) -> str:
        return json_line(
            {
                "index": index,
                "prompt": self.prompt,
                "text": self.text,
                "prompt_ids": self.prompt_ids,
                "ids": self.ids,
                "new_tokens": len(self.ids),
                "finish_reason": self.finish_reason,
            }
        )


def _generate(options: argparse.Namespace) -> None:
    without_garbage_collection()
    keep_compiled_programs(options)
    choices = sampling_choices(options)
    tokenizer, model = load_with_tokenizer(options)
    rows = [_Row(tokenizer, text, options.stop) for text in options.prompt]
    live = len(rows) == 1 and not options.json
    ends = stop_ids(model, options)

    def show(index: int, row: _Row, part: str) -> None:
        if live:
            write(part + "\n" * (row.finish_reason is not None))
        elif row.finish_reason is not None:
            text = tokenizer.decode(row.prompt_ids) + row.text
            write((row.to_json(index) if options.json else text) + "\n")

    begin = time.perf_counter()
    prompts, most = [row.prompt_ids for row in rows], options.max_new_tokens
    for tokens in new_tokens(model, prompts, options, choices, max_new_tokens=most):
        if live and not rows[0].ids:
            write(tokenizer.decode(rows[0].prompt_ids))
        for index, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if row.finish_reason is None:
                show(index, row, row.push(token, ends=token in ends))
        if all(row.finish_reason for row in rows):
            break
        if any(len(row.ids) > 1 for row in rows):  # all programs are there
            with_garbage_collection()
    for index, row in enumerate(rows):
        if row.finish_reason is None:
            show(index, row, row.finish())
    seconds = time.perf_counter() - begin
    count = sum(len(row.ids) for row in rows)
    print(f"{count} tokens in {seconds:.2f} s, compilation included", file=sys.stderr)
