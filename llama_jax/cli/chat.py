"""`python -m llama_jax chat`: a conversation, of which only what is new is run at each turn."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence

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
from llama_jax.text.chat_template import find_chat_template, render_chats
from llama_jax.text.conversation import Message, fit_conversation
from llama_jax.text.detokenize import TextStream
from llama_jax.text.lines import MARK


def add_chat(program: Parser) -> None:
    """Add the command to its program."""
    parser = program.add_command(
        "chat", _chat, help="chat interactively, one line per turn; Ctrl-D quits"
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_generation(parser, max_new_tokens=512)


def _chat(options: argparse.Namespace) -> None:
    from llama_jax.generation.prompt_cache import PromptCache
    from llama_jax.load import load_config, tokenizer_directory

    keep_compiled_programs(options)
    choices = sampling_choices(options)
    config = load_config(options.model)  # raises where this is no model
    template, special_tokens = find_chat_template(tokenizer_directory(options.model))
    tokenizer, model = load_with_tokenizer(options)
    context = options.cache_size or config.max_position_embeddings
    most = options.max_new_tokens

    def prompts(conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        jobs = [{"messages": each, "add_generation_prompt": True} for each in conversations]
        texts = render_chats(template, jobs, special_tokens=special_tokens)
        if error := next((text for text in texts if isinstance(text, ValueError)), None):
            raise error
        return [encode(tokenizer, str(text), "conversation", False) for text in texts]

    messages: list[Message] = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    prompt_cache = PromptCache()
    for line in _lines():
        messages.append({"role": "user", "content": line})
        room = min(most, max(context // 4, 1))
        try:
            messages, prompt, forgotten = fit_conversation(
                messages, prompts, context=context, room=room
            )
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            warnings.warn(f"{error}; the message is left out", stacklevel=2)
            messages.pop()
            continue
        if forgotten:
            warnings.warn(
                f"the context of {context} tokens is full: the oldest turns are forgotten ({forgotten})",
                stacklevel=2,
            )
        stream, answer, end = TextStream(tokenizer, prompt, options.stop), "", None
        try:
            for tokens in new_tokens(
                model,
                [prompt],
                options,
                choices,
                max_new_tokens=min(most, context - len(prompt)),
                prompt_cache=prompt_cache,
            ):
                token = int(tokens[0])
                if token in stop_ids(model, options):
                    end = token
                    break
                part = stream.push(token)
                answer += part
                write(part)
                if stream.stopped:
                    break
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                write("\n")
                raise
            # the answer so far stays in the conversation; the next Ctrl-C, at the prompt, ends the program
        rest = stream.finish(end)
        write(rest + "\n")
        messages.append({"role": "assistant", "content": answer + rest})


def _lines() -> Iterator[str]:
    """The lines that the user types, until the input ends."""
    interactive, first = sys.stdin.isatty(), True
    while True:
        if interactive:
            write("> ")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            write("\n" if interactive else "")
            raise
        except UnicodeDecodeError:
            raise ValueError("input: not UTF-8 text") from None
        if not line:
            return
        line = line.removeprefix(MARK) if first else line
        first = False
        if line.strip():
            yield line.rstrip("\n")
