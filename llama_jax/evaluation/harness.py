"""A model class of lm-evaluation-harness (`lm_eval`, the extra `eval`), registered as llama_jax.

lm_eval loads only the model classes that it has itself, so that its command line is run from here:

    python -m llama_jax.evaluation.harness --model llama_jax --model_args pretrained=DIR --tasks arc_easy

takes what `python -m lm_eval` takes. In a program of your own, import this module before
`lm_eval.simple_evaluate(model="llama_jax", model_args={"pretrained": "DIR"}, ...)`.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llama_jax.cli.program import leave, run_program
from llama_jax.evaluation.scoring import loglikelihood, loglikelihood_rolling, prefix_token
from llama_jax.inputs.lengths import bucket
from llama_jax.load import load_model, tokenizer_directory
from llama_jax.text.chat_template import chat_templates, render_chat
from llama_jax.text.encode import encode_text
from llama_jax.text.tokenizer import load_tokenizer, special_tokens
from llama_jax.text.tokenizer_files import read_files

try:
    import lm_eval.models  # noqa: F401 - registers its own classes, which it does not beside others
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError:  # `main` says how to install it
    TemplateLM = object

    def register_model(name: str) -> Any:
        """Leaves a class as it is."""
        return lambda kind: kind


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_BATCH_SIZE = 16
_NEW_TOKENS = 256  # as lm_eval's own models, where a task does not say
_STEPS = 8  # between two looks for stop strings
# tokens that run in the time of compiling a program: on a CPU, 4 s for a prefill of 135M
_COMPILATION = 1024


@register_model("llama_jax")
class HarnessModel(TemplateLM):
    """A causal LM with its tokenizer, as lm_eval's tasks use it.

    Args:
        pretrained: directory, or name on the Hub, as `llama_jax.load.load_model` takes it.
        dtype: of the weights; "auto" keeps the stored one.
        batch_size: sequences at a time; "auto" is 16.
        max_length: tokens that the model sees at once; default: max_position_embeddings. Longer contexts
            lose their beginning.
        adapter: directory, or name on the Hub, of a LoRA adapter of PEFT.
        seed: of sampling, in tasks that sample.
        max_batch_size, device: not used; lm_eval passes a CUDA device even where there is none, and
            JAX_PLATFORMS chooses it here.

    Raises:
        ValueError: what is there is no model with a tokenizer, or an argument is impossible.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_length: int | str | None = None,
        adapter: str | None = None,
        seed: int | str = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.model = load_model(pretrained, dtype, adapter=adapter)
        config = self.model.config
        directory = tokenizer_directory(pretrained)
        self._tokenizer = load_tokenizer(directory)
        self._files = read_files(directory)
        self._special_tokens = special_tokens(self._files)
        self._name = str(pretrained)
        self._seed = int(seed)
        batch = _BATCH_SIZE if str(batch_size).startswith(("auto", "None")) else batch_size
        self.batch_size = _positive("batch_size", batch, None)
        limit = config.max_position_embeddings
        self.max_length = _positive("max_length", max_length or limit, limit)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        text = self._special_tokens.get("eos_token")
        token = None if text is None else self._tokenizer.token_to_id(text)
        return next(iter(self.model.config.eos_token_ids), None) if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        token = prefix_token(self.model.config, self._tokenizer, self._special_tokens)
        if token is None:
            raise ValueError(f"{self._name}: has neither a bos nor an eos token, which tasks need")
        return token

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text; by default with the tokenizer's beginning-of-text token, once."""
        if add_special_tokens is None:
            before, ids = encode_text(self._tokenizer, string)
            return [*before, *ids]
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def tok_decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens)))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs: list[tuple[list[int], list[int]]] = []
        scored: list[int] = []
        for index, ((_text, continuation), context, tokens) in enumerate(requests):
            if len(tokens) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(tokens)} tokens ({continuation[:40]!r}...) is longer than "
                    f"max_length={self.max_length}"
                )
            if not tokens:
                continue
            kept = ([*(context or [self.prefix_token_id]), *tokens])[-self.max_length - 1 :]
            pairs.append((kept[: -len(tokens)], tokens))
            scored.append(index)
        results = [(0.0, True)] * len(requests)
        for index, score in zip(
            scored, loglikelihood(self.model, pairs, batch_size=self.batch_size), strict=True
        ):
            results[index] = (score.total, score.is_greedy)
        for (text, _context, _tokens), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def loglikelihood_rolling(
        self, requests: list["Instance"], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, in windows of `max_length`."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        scores = iter(
            loglikelihood_rolling(
                self.model,
                [tokens for tokens in texts if tokens],
                prefix_token_id=self.prefix_token_id,
                max_length=self.max_length,
                batch_size=self.batch_size,
            )
        )
        results = [next(scores).total if tokens else 0.0 for tokens in texts]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, each up to the first of its stop strings."""
        results = [""] * len(requests)
        contexts = [
            self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests
        ]

        def settings(index: int) -> str:
            return repr(sorted(requests[index].args[1].items(), key=str))

        order = sorted(range(len(requests)), key=lambda i: (settings(i), -len(contexts[i])))
        for _settings, group in groupby(order, key=settings):
            members = list(group)
            options = requests[members[0]].args[1]
            texts = self._generate([contexts[i] for i in members], dict(options))
            for index, text in zip(members, texts, strict=True):
                results[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return results

    def _generate(self, contexts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Continue contexts, the longest first, in batches of one size and few lengths.

        Args:
            options: of the task: until, max_gen_toks, do_sample, temperature, top_p, top_k.
        """
        until = options.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        eot = self.eot_token_id
        if eot is not None and (text := self._tokenizer.id_to_token(eot)) not in stops:
            stops.append(text)
        limits = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        given = [options.pop(name) for name in limits if options.get(name) is not None]
        new = _positive("max_gen_toks", given[0] if given else _NEW_TOKENS, None)
        if new >= self.max_length:
            raise ValueError(
                f"max_gen_toks: found {new}, expected less than max_length={self.max_length}"
            )
        sampling = _sampling(options)
        kept = [context[new - self.max_length :] for context in contexts]
        count = -(-len(kept) // self.batch_size)
        rows = -(-len(kept) // count)
        batches = [kept[start : start + rows] for start in range(0, len(kept), rows)]
        longest = [min(bucket(len(batch[0])), self.max_length - new) for batch in batches]
        widths = few_widths(longest, _COMPILATION / rows)
        texts: list[str] = []
        for batch, width in zip(batches, widths, strict=True):
            ids, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
            mask[len(batch) :, -1] = 1
            for row, context in enumerate(batch):
                ids[row, width - len(context) :] = context
                mask[row, width - len(context) :] = 1
            stream = self.model.stream(
                ids,
                mask,
                max_new_tokens=new,
                key=jax.random.key(self._seed),
                eos_token_id=() if eot is None else tuple({eot, *self.model.config.eos_token_ids}),
                pad_token_id=eot or 0,
                cache_capacity=widths[0] + new - 1,  # of all batches, which then share a program
                **sampling,
            )
            steps: list[np.ndarray] = []
            for step in stream:
                steps.append(step)
                if len(steps) % _STEPS == 0 and all(
                    self._stopped(steps, row, stops) for row in range(len(batch))
                ):
                    break
            tokens = np.stack(steps, axis=1)
            texts += [
                _before(self.tok_decode(_until_end(row, eot)), stops)
                for row in tokens[: len(batch)]
            ]
        return texts

    def _stopped(self, steps: list[np.ndarray], row: int, stops: Sequence[str]) -> bool:
        tokens = [int(step[row]) for step in steps]
        if self.eot_token_id in tokens:
            return True
        text = self.tok_decode(tokens)
        return any(stop and stop in text for stop in stops)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, by the checkpoint's template."""
        return render_chat(
            self.chat_template(),
            chat_history,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._special_tokens,
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The checkpoint's template of this name, or its default one."""
        templates = chat_templates(self._files)
        name = chat_template if isinstance(chat_template, str) else "default"
        if name not in templates:
            raise ValueError(f"{self._name}: has no chat template {name!r}")
        return templates[name]

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval's cache of requests is named after."""
        return self._name.replace("/", "__")


def few_widths(longest: Sequence[int], compilation: float) -> list[int]:
    """The widths of batches, the longest first: those for which padding and compiling take the least time.

    Args:
        longest: the least width of each batch, in descending order.
        compilation: the time of compiling for one more width, in tokens of each row that run meanwhile.

    >>> few_widths([100, 90, 30, 30], 25)
    [100, 100, 30, 30]
    >>> few_widths([100, 90, 30, 30], 1000)
    [100, 100, 100, 100]
    """
    # of the first n batches: the cost, and where those of the last width begin
    best: list[tuple[float, int]] = [(0, 0)]
    for end in range(1, len(longest) + 1):
        best.append(
            min(
                (best[begin][0] + compilation + (end - begin) * longest[begin], begin)
                for begin in range(end)
            )
        )
    widths: list[int] = []
    end = len(longest)
    while end:
        begin = best[end][1]
        widths = [longest[begin]] * (end - begin) + widths
        end = begin
    return widths


def _positive(name: str, value: Any, limit: int | None) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or (limit is not None and number > limit):
        most = f"1 to {limit}" if limit is not None else "a positive number"
        raise ValueError(f"{name}: found {value!r}, expected {most}")
    return number


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` for a task's options."""
    temperature = float(options.pop("temperature", 0.0) or 0.0)
    do_sample = options.pop("do_sample", None)
    sample = temperature > 0 if do_sample is None else bool(do_sample) and temperature != 0
    known: dict[str, Any] = {
        name: options.pop(name) for name in ("top_p", "top_k", "min_p") if name in options
    }
    if options:
        raise ValueError(
            f"generation_kwargs: found {', '.join(options)}, expected until, max_gen_toks, do_sample, "
            "temperature, top_p, top_k, min_p"
        )
    if not sample:
        return {"do_sample": False}
    known.update(do_sample=True, temperature=temperature)
    return known


def _until_end(tokens: np.ndarray, end: int | None) -> list[int]:
    ids = tokens.tolist()
    return ids[: ids.index(end)] if end in ids else ids


def _before(text: str, stops: Sequence[str]) -> str:
    """The text before its first stop string."""
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text


def main() -> int:
    """lm_eval's command line, with this model class. Returns the exit code."""

    def command() -> None:
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()

    return run_program(command, extra="eval")


if __name__ == "__main__":
    leave(main())
