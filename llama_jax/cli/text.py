"""`generate` and `chat` of the command line: text in, text out as it is formed."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llama_jax.cli.arguments import positive, some_text
from llama_jax.cli.program import json_line
from llama_jax.text.chat_template import find_chat_template, render_chat
from llama_jax.text.detokenize import TextStream
from llama_jax.text.lines import MARK
from llama_jax.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from llama_jax.models.causal_lm import LlamaForCausalLM

DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "int8")


def add_commands(commands: Any) -> None:
    """The parsers of both, with what they share."""
    generate = commands.add_parser("generate", help="continue one or several prompts")
    generate.set_defaults(command=_generate)
    chat = commands.add_parser("chat", help="talk with a model, a line a turn; ends with the input")
    chat.set_defaults(command=_chat)
    generate.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="repeat it for a batch"
    )
    generate.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    for parser, new in ((generate, 64), (chat, 512)):
        add = parser.add_argument
        add("--model", required=True, metavar="DIR", help="Hugging Face's, Orbax's or a run")
        add("--max-new-tokens", type=positive, default=new, metavar="N")
        add("--dtype", choices=DTYPES, help="default: as stored")
        add("--cache-dtype", choices=CACHE_DTYPES, help="of keys and values; default: the model's")
        add(
            "--cache-size",
            type=positive,
            metavar="N",
            help="slots of the key/value cache; default: prompt and new tokens",
        )
        add(
            "--sample",
            dest="do_sample",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="draw tokens; default: as the checkpoint says, or where a number below asks for it",
        )
        add("--temperature", type=float, metavar="T", help="0 is greedy")
        add("--top-k", type=int, metavar="K")
        add("--top-p", type=float, metavar="P")
        add("--min-p", type=float, metavar="P")
        add("--repetition-penalty", type=float, metavar="R")
        add("--seed", type=int, default=0, metavar="N")
        add(
            "--stop",
            type=some_text,
            action="append",
            default=[],
            metavar="TEXT",
            help="stop string, which may name special tokens; may be given several times",
        )
        add("--stop-id", action="append", type=int, metavar="ID", help="end at this token as well")


def _generate(options: argparse.Namespace) -> None:
    choices = _choices(options)
    tokenizer, model = _load(options)
    prompts = [_encode(tokenizer, text, "--prompt") for text in options.prompt]
    streams = [TextStream(tokenizer, prompt, options.stop) for prompt in prompts]
    live = len(prompts) == 1 and not options.json
    texts = ["" for _ in prompts]

    def say(row: int, text: str) -> None:
        texts[row] += text
        if live:
            _print(text)

    begin = time.perf_counter()
    new: list[list[int]] = [[] for _ in prompts]
    ends = ["length"] * len(prompts)
    for tokens in _tokens(model, prompts, options, choices):
        if live and not new[0]:
            _print(tokenizer.decode(prompts[0]))
        for row, token in enumerate(tokens.tolist()):
            if ends[row] != "length":
                continue
            new[row].append(token)
            if token in _ends(model, options):
                ends[row] = "stop"
                say(row, streams[row].finish(token))
            else:
                say(row, streams[row].push(token))
                ends[row] = "stop" if streams[row].stopped else "length"
        if all(end == "stop" for end in ends):
            break
    for row, stream in enumerate(streams):
        if ends[row] == "length":
            say(row, stream.finish())
            ends[row] = "stop" if stream.stopped else "length"
    seconds = time.perf_counter() - begin
    if live:
        _print("\n")
    for row, (prompt, text) in enumerate(zip(options.prompt, texts, strict=True)):
        if options.json:
            print(
                json_line(
                    {
                        "prompt": prompt,
                        "text": text,
                        "prompt_ids": prompts[row],
                        "ids": new[row],
                        "new_tokens": len(new[row]),
                        "finish_reason": ends[row],
                    }
                )
            )
        elif not live:
            print(tokenizer.decode(prompts[row]) + text)
    print(f"{sum(map(len, new))} tokens in {seconds:.2f} s, compilation included", file=sys.stderr)


def _chat(options: argparse.Namespace) -> None:
    from llama_jax.load import load_config, tokenizer_directory

    choices = _choices(options)
    load_config(options.model)  # says what is there instead of a model
    template, special_tokens = find_chat_template(tokenizer_directory(options.model))
    tokenizer, model = _load(options)
    messages = [{"role": "system", "content": options.system}] if options.system is not None else []
    for line in _lines():
        messages.append({"role": "user", "content": line})
        text = render_chat(template, messages, special_tokens=special_tokens)
        prompt = _encode(tokenizer, text, "conversation", add_special_tokens=False)
        stream, answer, end = TextStream(tokenizer, prompt, options.stop), "", None
        try:
            for tokens in _tokens(model, [prompt], options, choices):
                token = int(tokens[0])
                if token in _ends(model, options):
                    end = token
                    break
                part = stream.push(token)
                answer += part
                _print(part)
                if stream.stopped:
                    break
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # nobody is there to say something else
                _print("\n")
                raise
            # what was said stays said; the next Ctrl-C, at the prompt, ends the program
        rest = stream.finish(end)
        _print(rest + "\n")
        messages.append({"role": "assistant", "content": answer + rest})


def _lines() -> Iterator[str]:
    """What the user says, until the input ends."""
    asks, first = sys.stdin.isatty(), True
    while True:
        if asks:
            _print("> ")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            _print("\n" if asks else "")
            raise
        except UnicodeDecodeError:
            raise ValueError("input: found bytes that are not UTF-8, expected text") from None
        if not line:
            return
        line = line.removeprefix(MARK) if first else line
        first = False
        if line.strip():
            yield line.rstrip("\n")


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags as `generate` takes them."""
    temperature, sample = options.temperature, options.do_sample
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature: found {temperature}, expected a number of at least 0")
    if temperature == 0:
        temperature, sample = None, False
    asked = (temperature, options.top_k, options.top_p, options.min_p)
    if sample is None and any(value is not None for value in asked):
        sample = True
    return {
        "do_sample": sample,
        "temperature": temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
    }


def _ends(model: LlamaForCausalLM, options: argparse.Namespace) -> tuple[int, ...]:
    """The tokens that end a text: the checkpoint's and the user's."""
    return (*model.generation_config.eos_token_ids, *(options.stop_id or ()))


def _tokens(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    options: argparse.Namespace,
    choices: dict[str, Any],
) -> Iterator[np.ndarray]:
    """The new tokens of all prompts, [batch] at a time; shorter prompts are padded on the left."""
    import jax
    import numpy as np

    width = max(map(len, prompts))
    ids = np.asarray([[0] * (width - len(prompt)) + prompt for prompt in prompts], np.int32)
    mask = np.asarray([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return model.stream(
        ids,
        mask,
        max_new_tokens=options.max_new_tokens,
        key=jax.random.key(options.seed),
        cache_capacity=options.cache_size,
        cache_dtype=options.cache_dtype,
        eos_token_id=_ends(model, options),
        **choices,
    )


def _load(options: argparse.Namespace) -> tuple[Any, LlamaForCausalLM]:
    from llama_jax.load import load_config, load_model, tokenizer_directory

    load_config(options.model)  # says what is there instead of a model
    # the tokenizer first: it is read in no time, and what is wrong with it is then said at once
    tokenizer = load_tokenizer(tokenizer_directory(options.model))
    return tokenizer, load_model(options.model, options.dtype)


def _encode(tokenizer: Any, text: str, name: str, add_special_tokens: bool = True) -> list[int]:
    try:
        ids = tokenizer.encode(text.encode().decode(), add_special_tokens=add_special_tokens).ids
    except UnicodeError:
        raise ValueError(f"{name}: found bytes that are not UTF-8, expected text") from None
    if not ids:
        raise ValueError(f"{name}: found no tokens, expected at least one")
    return ids


def _print(text: str) -> None:
    print(text, end="", flush=True)
