"""Conversations as text, and which parts of it the assistant says.

A template that marks those parts with `{% generation %}` says it itself, as in transformers. Of any other,
the conversation is rendered up to each assistant turn, with the prompt for it, and then with the turn: what
is added is the turn. Both must be the beginning of the whole conversation's text. Where a template leaves
out the beginning of earlier turns (their reasoning, say), the rest of the turn must follow the prompt
there, up to the token that ends it. White space after that token is not the assistant's.

A message may say that it is not to be learned: OpenAI and Mistral call that weight, ms-swift loss, Axolotl
train or training, verl trainable or loss_mask.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from llama_jax.text.chat_template import render_chats

ASSISTANT = "assistant"

# fields of a message with 0 or false for a turn that is not in the loss
_TRAINED = ("weight", "loss", "loss_mask", "train", "training", "trainable")
# the same for ranges of characters, which is not supported
_TRAINED_IN_PART = ("train_detail", "training_detail")

# fields of a row that go with its messages
_SYSTEM = ("system", "system_prompt")
_TOOLS, _VARIABLES = "tools", "chat_template_kwargs"
FIELDS = (*_SYSTEM, _TOOLS, _VARIABLES)

# what a turn without content may have
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")

_TOOL_ROLES = (
    "tool",
    "ipython",
    "function",
)  # what they say may be an object, which templates write

# roles of ShareGPT's rows, {"from": ..., "value": ...}
_SHARE_GPT = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT}

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
# a template for content in parts, {"type": "text", "text": ...}
_READS_PARTS = re.compile(r"""\[\s*['"]text['"]\s*\]|\.text\b""")

Message = Mapping[str, Any]
Spans = tuple[tuple[int, int], ...]


class Chat(NamedTuple):
    """A conversation, and where it was read, for messages about it.

    variables: what the template gets beside the messages, such as tools.
    """

    where: str
    messages: Sequence[Message]
    variables: Mapping[str, Any] = MappingProxyType({})

    @property
    def key(self) -> str:
        """What decides its split."""
        if not self.variables:
            return json.dumps(self.messages, sort_keys=True)
        return json.dumps([self.messages, dict(self.variables)], sort_keys=True)


class RenderedChat(NamedTuple):
    """The text of a conversation, and what the assistant says, as ranges of characters."""

    where: str
    text: str
    spans: Spans


class Template(NamedTuple):
    """A chat template, the texts of special tokens by name, and those that a tokenizer does not split."""

    source: str
    special_tokens: Mapping[str, str]
    unsplit: frozenset[str]


def parse_chat(where: str, field: str, row: Mapping[str, Any]) -> Chat:
    """The messages in a row, and what else it has for the template: see `FIELDS`.

    Messages with `from` and `value`, ShareGPT's, become ones with `role` and `content`. The text of a field
    `system` becomes the first message.

    Raises:
        ValueError: they are none, or have no roles; a field has another type than it should.
    """
    value = row[field]
    if not isinstance(value, list) or not value:
        shown = "no messages" if value == [] else type(value).__name__
        raise ValueError(f"{where}: found {shown} as {field!r}, expected a list of messages")
    messages = [_message(f"{where}: message {n}", message) for n, message in enumerate(value, 1)]
    if not any(message["role"] == ASSISTANT for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(
            f"{where}: found the roles {roles}, expected a turn of the assistant, on which the loss is"
        )
    for name in _SYSTEM:
        system = row.get(name)
        if not system:
            continue
        if not isinstance(system, str):
            raise ValueError(f"{where}: found {type(system).__name__} as {name!r}, expected text")
        if messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0].get("content") != system:
            raise ValueError(
                f"{where}: found {name!r} and a first message of the system, expected one of them"
            )
    return Chat(where, messages, _variables(where, row))


def _variables(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the template gets beside the messages."""
    variables = row.get(_VARIABLES) or {}
    tools = row.get(_TOOLS) or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: {_TOOLS}: not valid JSON ({error})") from None
    if not isinstance(variables, dict):
        found = type(variables).__name__
        raise ValueError(f"{where}: found {found} as {_VARIABLES!r}, expected an object")
    if reserved := variables.keys() & {"messages", "add_generation_prompt"}:
        raise ValueError(f"{where}: {_VARIABLES}: found {min(reserved)!r}, expected other names")
    if tools is None:
        return variables
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: found {_TOOLS!r} that is no list of objects, expected one")
    return {**variables, _TOOLS: tools}


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        found = type(message).__name__
        raise ValueError(f'{where}: found {found}, expected {{"role": ..., "content": ...}}')
    if isinstance(message.get("from"), str) and message.get("role") is None:
        rest = {name: item for name, item in message.items() if name not in ("from", "value")}
        role = _SHARE_GPT.get(message["from"], message["from"])
        message = {**rest, "role": role, "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        found = f"an object with {', '.join(message) or 'nothing'}"
        raise ValueError(f'{where}: found {found}, expected {{"role": ..., "content": ...}}')
    for name in _TRAINED:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise ValueError(f"{where}: found {value!r} as {name!r}, expected 0 or 1")
    for name in _TRAINED_IN_PART:
        if message.get(name):
            raise ValueError(f"{where}: {name!r} is not supported: a turn is in the loss or not")
    return message


def _trained(message: Message) -> bool:
    """Whether a turn is in the loss."""
    return all(message.get(name) in (None, 1) for name in _TRAINED)


def render(template: Template, chats: Sequence[Chat]) -> Iterator[RenderedChat]:
    """The texts of conversations, with the assistant's parts.

    Raises:
        ValueError: naming the conversation: the template fails, or does not tell the assistant's parts;
            content that is no text.
    """
    parts = bool(_READS_PARTS.search(template.source))
    if not parts:
        chats = [chat._replace(messages=[*map(_joined, chat.messages)]) for chat in chats]
    for chat in chats:
        _require_text(chat, parts)
    if _GENERATION.search(template.source):
        return _render_marked(template, chats)
    return _render_prefixes(template, chats)


def _joined(message: Message) -> Message:
    """Content that is a list of texts as one text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    found = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if not texts or len(texts) < len(found):
        return message
    return {**message, "content": "".join(texts)}


def _require_text(chat: Chat, parts: bool) -> None:
    """Raise ValueError for content that a template would write as Python shows it, or leave out."""
    for n, message in enumerate(chat.messages, 1):
        content = message.get("content")
        if content is None and any(message.get(name) for name in _INSTEAD):
            continue
        text = isinstance(content, str) or (parts and isinstance(content, list))
        if text or message["role"] in _TOOL_ROLES:
            continue
        found = "nothing" if content is None else type(content).__name__
        if isinstance(content, list):
            kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
            found = f"parts of type {', '.join(map(str, kinds))}" if kinds else "an empty list"
        raise ValueError(f"{chat.where}: message {n}: found {found} as content, expected text")


def _render_jobs(
    template: Template, jobs: Sequence[Mapping[str, Any]], marks: tuple[str, str] = ("", "")
) -> list[str | ValueError]:
    """As `render_chats`; its limits are those of a single conversation, so too many are divided."""
    try:
        return render_chats(
            template.source, jobs, special_tokens=template.special_tokens, marks=marks
        )
    except ValueError as error:
        if len(jobs) == 1:
            return [error]
    half = len(jobs) // 2
    return [
        *_render_jobs(template, jobs[:half], marks),
        *_render_jobs(template, jobs[half:], marks),
    ]


def _render_marked(template: Template, chats: Sequence[Chat]) -> Iterator[RenderedChat]:
    begin, end = (f"\ue000{secrets.token_hex(8)}{side}\ue001" for side in "<>")
    jobs = [_job(chat, len(chat.messages)) for chat in chats]
    plain = _render_jobs(template, jobs)
    marked = _render_jobs(template, jobs, (begin, end))
    for chat, text, with_marks in zip(chats, plain, marked, strict=True):
        text, with_marks = _valid(chat, text), _valid(chat, with_marks)
        spans, place, start = [], 0, None
        for part in re.split(f"({begin}|{end})", with_marks):
            if part == begin:
                start = place
            elif part == end and start is not None:
                spans.append((start, place))
                start = None
            else:
                place += len(part)
        if with_marks.replace(begin, "").replace(end, "") != text:
            raise ValueError(
                f"{chat.where}: chat template: changes what is in a generation block after it"
            )
        learned = [_trained(chat.messages[turn]) for turn in _turns(chat)]
        if not all(learned):
            if len(spans) != len(learned):
                raise ValueError(
                    f"{chat.where}: has turns of the assistant that are not to be learned, and the chat "
                    f"template marks {len(spans)} parts of {len(learned)} turns, expected one of each"
                )
            spans = [span for span, kept in zip(spans, learned, strict=True) if kept]
        yield RenderedChat(chat.where, text, tuple(span for span in spans if span[0] < span[1]))


def _render_prefixes(template: Template, chats: Sequence[Chat]) -> Iterator[RenderedChat]:
    jobs, counts = [], []
    for chat in chats:
        own = [_job(chat, len(chat.messages))]
        for turn in _learned_turns(chat):
            own.append(_job(chat, turn, prompt=True))
            own.append(_job(chat, turn + 1))
        jobs += own
        counts.append(len(own))
    texts = iter(_render_jobs(template, jobs))
    for chat, count in zip(chats, counts, strict=True):
        whole, *prefixes = [_valid(chat, next(texts)) for _ in range(count)]
        spans = [
            _span(chat, turn, whole, before, after, template)
            for turn, before, after in zip(
                _learned_turns(chat), prefixes[::2], prefixes[1::2], strict=True
            )
        ]
        yield RenderedChat(chat.where, whole, tuple(spans))


def _span(
    chat: Chat, turn: int, whole: str, before: str, after: str, template: Template
) -> tuple[int, int]:
    """The assistant's turn in the whole text, from the texts that end before and after it."""
    begin = len(before)
    if whole.startswith(before) and after.startswith(before) and len(after) > begin:
        said = after[begin:].rstrip()
        ends = [token for token in template.unsplit if said.endswith(token)]
        if whole.startswith(after):
            return begin, begin + len(said) if ends else len(after)
        # without what stands first, such as reasoning, but up to the token that ends the turn
        body = len(said) - max(map(len, ends), default=len(said))
        for first in range(body):
            if whole.startswith(said[first:], begin) and said[first:body].strip():
                return begin, begin + len(said) - first
    raise ValueError(
        f"{chat.where}: message {turn + 1}: the chat template renders it otherwise in the whole "
        "conversation, so its place is not known: mark what the assistant says with {% generation %} "
        "in the template"
    )


def _turns(chat: Chat) -> list[int]:
    return [n for n, message in enumerate(chat.messages) if message["role"] == ASSISTANT]


def _learned_turns(chat: Chat) -> list[int]:
    return [turn for turn in _turns(chat) if _trained(chat.messages[turn])]


def _job(chat: Chat, stop: int, *, prompt: bool = False) -> dict[str, Any]:
    """The first `stop` messages."""
    return {
        **chat.variables,
        "messages": chat.messages[:stop],
        "add_generation_prompt": prompt,
    }


def _valid(chat: Chat, text: str | ValueError) -> str:
    if isinstance(text, ValueError):
        raise ValueError(f"{chat.where}: {text}") from None
    return text


def assistant_tokens(chat: RenderedChat, encoding: Any) -> list[bool]:
    """Which tokens of its `tokenizers.Encoding` the assistant says, from first to last character.

    Raises:
        ValueError: none of them, or all.
    """
    said = [False] * len(encoding.ids)
    for begin, end in chat.spans:
        places = (encoding.char_to_token(place) for place in range(begin, end))
        first = next((token for token in places if token is not None), None)
        places = (encoding.char_to_token(place) for place in range(end - 1, begin - 1, -1))
        last = next((token for token in places if token is not None), None)
        if first is not None and last is not None:
            said[first : last + 1] = [True] * (last + 1 - first)
    if not any(said) or all(said):
        found = "all" if any(said) else "none"
        raise ValueError(
            f"{chat.where}: {found} of its {len(said)} tokens would be in the loss, expected those of the "
            "assistant's turns"
        )
    return said
