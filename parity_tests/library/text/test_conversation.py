"""What is forgotten where a conversation is longer than the context."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.text.conversation import Message, fit_conversation


def encode(conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """One token for each word of each message."""
    return [[1 for each in messages for _ in each["content"].split()] for messages in conversations]


def chat(sizes: Sequence[int], system: int = 0) -> list[Message]:
    """Messages of so many words; user and assistant in turn."""
    roles = ("user", "assistant")
    messages: list[Any] = [{"role": "system", "content": "s " * system}] if system else []
    return messages + [
        {"role": roles[n % 2], "content": f"w{n} " * size} for n, size in enumerate(sizes)
    ]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=15).filter(lambda sizes: len(sizes) % 2),
    st.integers(0, 3),
    st.integers(1, 5),
)
def test_the_newest_turns_stay_and_leave_room(sizes: list[int], system: int, room: int) -> None:
    messages, context = chat(sizes, system), 20
    fitted = fit_conversation(messages, encode, context=context, room=room)
    assert [fitted.prompt] == encode([fitted.messages])
    first = 1 if system else 0
    assert fitted.messages == messages[:first] + messages[first + 2 * fitted.forgotten :]
    assert len(fitted.prompt) < context
    needed = sum(sizes) + system
    if needed + room <= context:
        assert not fitted.forgotten
        return
    if fitted.forgotten:
        only_newest = len(fitted.messages) == first + 1
        assert len(fitted.prompt) <= context // 2 or only_newest
        # one turn fewer would not have been enough
        if fitted.forgotten > 1:
            assert len(fitted.prompt) + sum(_turn(sizes, fitted.forgotten - 1)) > context // 2


def _turn(sizes: Sequence[int], number: int) -> Sequence[int]:
    return sizes[2 * number : 2 * number + 2]


def test_a_message_that_fills_the_context() -> None:
    messages = chat([3, 3, 20], system=2)
    with pytest.raises(ValueError, match=r"message: found 22 tokens .*, expected less than the 22"):
        fit_conversation(messages, encode, context=22, room=1)
    fitted = fit_conversation(messages, encode, context=23, room=5)
    assert (len(fitted.prompt), fitted.forgotten) == (22, 1)
