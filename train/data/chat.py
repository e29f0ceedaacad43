"""Conversations as text, and which parts of it the assistant says.

A template that marks those parts with `{% generation %}` says it itself, as in transformers. Of any other,
the conversation is rendered up to each assistant turn, with the prompt for it, and then with the turn: what
is added is the turn. Both must be the beginning of the whole conversation's text. Where a template leaves
out the beginning of earlier turns (their reasoning, say), the rest of the turn must follow the prompt
there, up to the token that ends it. White space after that token is not the assistant's.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.text.chat_template import render_chats

ASSISTANT = "assistant"

# roles of ShareGPT's rows, {"from": ..., "value": ...}
_SHARE_GPT = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT}

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
# a template for content in parts, {"type": "text", "text": ...}
_READS_PARTS = re.compile(r"""\[\s*['"]text['"]\s*\]|\.text\b""")

Message = Mapping[str, Any]
Spans = tuple[tuple[int, int], ...]


class Chat(NamedTuple):
    """A conversation, and where it was read, for messages about it."""

    where: str
    messages: Sequence[Message]

    @property
    def key(self) -> str:
        """What decides its split."""
        return json.dumps(self.messages, sort_keys=True)


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


def parse_chat(where: str, field: str, value: Any) -> Chat:
    """The messages in a row.

    Messages with `from` and `value`, ShareGPT's, become ones with `role` and `content`.

    Raises:
        ValueError: they are none, or have no roles.
    """
    if not isinstance(value, list) or not value:
        shown = "no messages" if value == [] else type(value).__name__
        raise ValueError(f"{where}: found {shown} as {field!r}, expected a list of messages")
    messages = [_message(f"{where}: message {n}", message) for n, message in enumerate(value, 1)]
    if not any(message["role"] == ASSISTANT for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(
            f"{where}: found the roles {roles}, expected a turn of the assistant, on which the loss is"
        )
    return Chat(where, messages)


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
    return message


def render(template: Template, chats: Sequence[Chat]) -> Iterator[RenderedChat]:
    """The texts of conversations, with the assistant's parts.

    Raises:
        ValueError: naming the conversation: the template fails, or does not tell the assistant's parts.
    """
    if not _READS_PARTS.search(template.source):
        chats = [chat._replace(messages=[*map(_joined, chat.messages)]) for chat in chats]
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
    jobs = [_job(chat.messages) for chat in chats]
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
        yield RenderedChat(chat.where, text, tuple(span for span in spans if span[0] < span[1]))


def _render_prefixes(template: Template, chats: Sequence[Chat]) -> Iterator[RenderedChat]:
    jobs, counts = [], []
    for chat in chats:
        own = [_job(chat.messages)]
        for turn in _turns(chat):
            own.append(_job(chat.messages[:turn], prompt=True))
            own.append(_job(chat.messages[: turn + 1]))
        jobs += own
        counts.append(len(own))
    texts = iter(_render_jobs(template, jobs))
    for chat, count in zip(chats, counts, strict=True):
        whole, *prefixes = [_valid(chat, next(texts)) for _ in range(count)]
        spans = [
            _span(chat, turn, whole, before, after, template)
            for turn, before, after in zip(_turns(chat), prefixes[::2], prefixes[1::2], strict=True)
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


def _job(messages: Sequence[Message], *, prompt: bool = False) -> dict[str, Any]:
    return {"messages": messages, "add_generation_prompt": prompt}


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
