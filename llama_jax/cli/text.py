"""`python -m llama_jax generate` and `chat`: text is printed as it is generated."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llama_jax.cli.arguments import (
    DTYPES,
    Parser,
    add_model,
    option_names,
    positive,
    seed,
    some_text,
)
from llama_jax.cli.compiled_programs import add_cache, keep_compiled_programs
from llama_jax.cli.program import json_line
from llama_jax.text.chat_template import find_chat_template, render_chat
from llama_jax.text.detokenize import TextStream
from llama_jax.text.lines import MARK
from llama_jax.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from llama_jax.models.causal_lm import LlamaForCausalLM

CACHE_DTYPES = (*DTYPES, "int8")


def add_generate(program: Parser) -> None:
    """Add `generate` to its program."""
    parser = program.add_command("generate", _generate, help="continue one or several prompts")
    add_model(parser)
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="text to continue; may be given several times, for a batch",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object per prompt")
    _add_generation(parser, max_new_tokens=64)


def add_chat(program: Parser) -> None:
    """Add `chat` to its program."""
    parser = program.add_command(
        "chat", _chat, help="chat interactively, one line per turn; Ctrl-D quits"
    )
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    _add_generation(parser, max_new_tokens=512)


def _add_generation(parser: Parser, max_new_tokens: int) -> None:
    """The options of both."""
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help="maximum number of tokens to generate",
    )
    add("--dtype", choices=DTYPES, help="dtype of the weights; default: as stored")
    add(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="dtype of the KV cache; default: the model's",
    )
    add(
        "--cache-size",
        type=positive,
        metavar="N",
        help="KV-cache length in tokens; default: prompt + new tokens",
    )
    add(
        "--sample",
        dest="do_sample",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="sample instead of greedy decoding; default: the checkpoint's setting, or on if a "
        "sampling option is given",
    )
    add("--temperature", type=float, metavar="T", help="divides the logits; 0: greedy decoding")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens whose probabilities sum to P",
    )
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="sample from tokens at least P times as likely as the most likely one",
    )
    add(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1, makes tokens that have occurred less likely",
    )
    add("--seed", type=seed, default=0, metavar="N", help="seed of the sampling")
    add(
        "--stop",
        type=some_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="stop string, which may contain special tokens; may be given several times",
    )
    add(
        "--stop-id",
        action="append",
        type=int,
        metavar="ID",
        help="additional stop token id; may be given several times",
    )
    add_cache(parser)


def _generate(options: argparse.Namespace) -> None:
    keep_compiled_programs(options)
    choices = _choices(options)
    tokenizer, model = _load(options)
    prompts = [_encode(tokenizer, text, "--prompt") for text in options.prompt]
    streams = [TextStream(tokenizer, prompt, options.stop) for prompt in prompts]
    live = len(prompts) == 1 and not options.json
    texts = ["" for _ in prompts]

    def emit(row: int, text: str) -> None:
        texts[row] += text
        if live:
            _print(text)

    begin = time.perf_counter()
    new_ids: list[list[int]] = [[] for _ in prompts]
    finish_reasons = ["length"] * len(prompts)
    for tokens in _tokens(model, prompts, options, choices):
        if live and not new_ids[0]:
            _print(tokenizer.decode(prompts[0]))
        for row, token in enumerate(tokens.tolist()):
            if finish_reasons[row] != "length":
                continue
            new_ids[row].append(token)
            if token in _stop_ids(model, options):
                finish_reasons[row] = "stop"
                emit(row, streams[row].finish(token))
            else:
                emit(row, streams[row].push(token))
                finish_reasons[row] = "stop" if streams[row].stopped else "length"
        if all(reason == "stop" for reason in finish_reasons):
            break
    for row, stream in enumerate(streams):
        if finish_reasons[row] == "length":
            emit(row, stream.finish())
            finish_reasons[row] = "stop" if stream.stopped else "length"
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
                        "ids": new_ids[row],
                        "new_tokens": len(new_ids[row]),
                        "finish_reason": finish_reasons[row],
                    }
                )
            )
        elif not live:
            print(tokenizer.decode(prompts[row]) + text)
    print(
        f"{sum(map(len, new_ids))} tokens in {seconds:.2f} s, compilation included", file=sys.stderr
    )


def _chat(options: argparse.Namespace) -> None:
    from llama_jax.load import load_config, tokenizer_directory

    keep_compiled_programs(options)
    choices = _choices(options)
    load_config(options.model)  # raises where this is no model
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
                if token in _stop_ids(model, options):
                    end = token
                    break
                part = stream.push(token)
                answer += part
                _print(part)
                if stream.stopped:
                    break
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                _print("\n")
                raise
            # the answer so far stays in the conversation; the next Ctrl-C, at the prompt, ends the program
        rest = stream.finish(end)
        _print(rest + "\n")
        messages.append({"role": "assistant", "content": answer + rest})


def _lines() -> Iterator[str]:
    """The lines that the user types, until the input ends."""
    interactive, first = sys.stdin.isatty(), True
    while True:
        if interactive:
            _print("> ")
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            _print("\n" if interactive else "")
            raise
        except UnicodeDecodeError:
            raise ValueError("input: not UTF-8 text") from None
        if not line:
            return
        line = line.removeprefix(MARK) if first else line
        first = False
        if line.strip():
            yield line.rstrip("\n")


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling options as arguments of `generate`."""
    temperature, sample = options.temperature, options.do_sample
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature: found {temperature}, expected a number of at least 0")
    if temperature == 0:
        temperature, sample = None, False
    sampling = (temperature, options.top_k, options.top_p, options.min_p)
    if sample is None and any(value is not None for value in sampling):
        sample = True
    return {
        "do_sample": sample,
        "temperature": temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
    }


def _stop_ids(model: LlamaForCausalLM, options: argparse.Namespace) -> tuple[int, ...]:
    """Stop tokens: the checkpoint's and those of --stop-id."""
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
    with option_names(options, cache_capacity="cache_size", eos_token_id="stop_id"):
        yield from model.stream(
            ids,
            mask,
            max_new_tokens=options.max_new_tokens,
            key=jax.random.key(options.seed),
            cache_capacity=options.cache_size,
            cache_dtype=options.cache_dtype,
            eos_token_id=_stop_ids(model, options),
            **choices,
        )


def _load(options: argparse.Namespace) -> tuple[Any, LlamaForCausalLM]:
    from llama_jax.load import load_config, load_model, tokenizer_directory

    load_config(options.model)  # raises where this is no model
    # the tokenizer first: it loads fast, so that its errors are reported before the model is read
    tokenizer = load_tokenizer(tokenizer_directory(options.model))
    return tokenizer, load_model(options.model, options.dtype)


def _encode(tokenizer: Any, text: str, name: str, add_special_tokens: bool = True) -> list[int]:
    try:
        ids = tokenizer.encode(text.encode().decode(), add_special_tokens=add_special_tokens).ids
    except UnicodeError:
        raise ValueError(f"{name}: not UTF-8 text") from None
    if not ids:
        raise ValueError(f"{name}: tokenizes to no tokens, expected at least one")
    return ids


def _print(text: str) -> None:
    print(text, end="", flush=True)
