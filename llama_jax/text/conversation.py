"""What of a conversation a model sees when all of it is longer than the context."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, Any]


class Fitted(NamedTuple):
    """A conversation that fits, its tokens, and how many of its oldest turns were left out."""

    messages: list[Message]
    prompt: list[int]
    forgotten: int


def fit_conversation(
    messages: Sequence[Message],
    encode: Callable[[Sequence[Sequence[Message]]], Sequence[list[int]]],
    *,
    context: int,
    room: int,
) -> Fitted:
    """The conversation, without its oldest turns where it does not leave room for an answer.

    A turn is a message of the user and its answer. So many are left out that what stays takes at most half
    of the context, so that the next turns fit as well. System messages and the newest message always stay.

    Args:
        messages: the last one is to be answered.
        encode: the prompts of several conversations.
        context: tokens of prompt and answer together.
        room: tokens of the answer.

    Raises:
        ValueError: the newest message alone fills the context.

    >>> def one_token_a_message(conversations):
    ...     return [[0] * len(messages) for messages in conversations]
    >>> chat = [{"role": role, "content": ""} for role in ("user", "assistant") * 3 + ("user",)]
    >>> fitted = fit_conversation(chat, one_token_a_message, context=8, room=2)
    >>> len(fitted.messages), fitted.forgotten
    (3, 2)
    """
    (prompt,) = encode([messages])
    if len(prompt) + room <= context:
        return Fitted(list(messages), prompt, 0)
    first = next(n for n, message in enumerate(messages) if message["role"] != "system")
    shorter = [[*messages[:first], *messages[start:]] for start in range(first, len(messages), 2)]
    prompts = encode(shorter)
    short = (n for n, ids in enumerate(prompts) if n and len(ids) <= context // 2)
    turns = next(short, len(shorter) - 1)
    if len(prompts[turns]) >= context:
        raise ValueError(
            f"message: found {len(prompts[turns])} tokens with the chat template, expected less than the "
            f"{context} of the context"
        )
    return Fitted(shorter[turns], prompts[turns], turns)
