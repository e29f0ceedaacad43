"""What `python -m llama_jax generate` and `chat` share: options, and tokens as they are generated."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llama_jax.cli.arguments import (
    DTYPES,
    Parser,
    option_names,
    positive,
    seed,
    some_text,
)
from llama_jax.cli.compiled_programs import add_cache
from llama_jax.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import numpy as np

    from llama_jax.generation.prompt_cache import PromptCache
    from llama_jax.models.causal_lm import LlamaForCausalLM

CACHE_DTYPES = (*DTYPES, "int8")


def add_generation(parser: Parser, max_new_tokens: int) -> None:
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
        help="KV-cache length in tokens; default: prompt + new tokens, in a chat the model's context",
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


def sampling_choices(options: argparse.Namespace) -> dict[str, Any]:
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


def stop_ids(model: LlamaForCausalLM, options: argparse.Namespace) -> tuple[int, ...]:
    """Stop tokens: the checkpoint's and those of --stop-id."""
    return (*model.generation_config.eos_token_ids, *(options.stop_id or ()))


def new_tokens(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    options: argparse.Namespace,
    choices: dict[str, Any],
    *,
    max_new_tokens: int,
    prompt_cache: PromptCache | None = None,
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
            max_new_tokens=max_new_tokens,
            key=jax.random.key(options.seed),
            cache_capacity=options.cache_size,
            cache_dtype=options.cache_dtype,
            eos_token_id=stop_ids(model, options),
            prompt_cache=prompt_cache,
            **choices,
        )


def load_with_tokenizer(options: argparse.Namespace) -> tuple[Any, LlamaForCausalLM]:
    """The tokenizer and the model of the options."""
    from llama_jax.load import load_config, load_model, tokenizer_directory

    load_config(options.model)  # raises where this is no model
    # the tokenizer first: it loads fast, so that its errors are reported before the model is read
    tokenizer = load_tokenizer(tokenizer_directory(options.model))
    return tokenizer, load_model(options.model, options.dtype)


def encode(tokenizer: Any, text: str, name: str, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text; `name` is what an error calls it."""
    try:
        ids = tokenizer.encode(text.encode().decode(), add_special_tokens=add_special_tokens).ids
    except UnicodeError:
        raise ValueError(f"{name}: not UTF-8 text") from None
    if not ids:
        raise ValueError(f"{name}: tokenizes to no tokens, expected at least one")
    return ids


def write(text: str) -> None:
    """Print at once, without a line end."""
    print(text, end="", flush=True)
