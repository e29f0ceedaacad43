"""Chats: texts and masks as transformers' `apply_chat_template` has them; what has no mask is an error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama_jax.loss import IGNORE_INDEX
from llama_jax.text.chat_template import render_chats
from parity_tests.train.data.formats.opened import error_of
from train.data import chat
from train.data.chat import Chat
from train.data.token_directory import TokenDirectory
from train.data.token_shards import open_tokens, read_index
from train.data.tokenize import tokenize
from train.data.tokens import document_ends, loss_mask, read_tokens
from train.data.windows import window

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[INST]", "[/INST]",
]  # fmt: skip
# what the assistant says is within {% generation %} in all of them
TEMPLATES = {
    "chatml": "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama 3": "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "reasoning of the last turn": "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "reasoning in the content": "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.index0 > ns.last else m.content.split('</think>')[-1].lstrip('\n') }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello, you."}],
    [
        {"role": "system", "content": "Be brief. Grüße 🙂"},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1 🙂 é", "reasoning_content": "a sum"},
        {"role": "user", "content": "1 🙂 é\nand two?"},
        {"role": "assistant", "content": "2", "reasoning_content": "another\n\nsum"},
        {"role": "user", "content": "Bye"},
    ],
    [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a a"},
    ],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nq\n</think>\n\nq"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nmore\n</think>\n\nq"},
    ],
]


def without_marks(template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}", "", template)


def make_tokenizer(directory: Path, template: str | None) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant and Hello, you."] * 3, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def expected(
    directory: Path, template: str, chat: list[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Ids and mask by transformers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    out = tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def write_chats(path: Path, chats: list[Any], field: str = "messages") -> Path:
    path.write_text("".join(json.dumps({field: chat}) + "\n" for chat in chats))
    return path


def masked_documents(directory: Path) -> list[tuple[list[int], list[int]]]:
    tokens = open_tokens(directory, "train")
    mask = loss_mask(tokens, 0, len(tokens))
    assert mask is not None
    ends = document_ends(tokens, 0, len(tokens))[:-1]
    ids = np.split(read_tokens(tokens, 0, len(tokens), 1 << 20), ends)
    return [
        (a.tolist(), m.astype(int).tolist()) for a, m in zip(ids, np.split(mask, ends), strict=True)
    ]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(name: str, marked: bool, tmp_path: Path) -> None:
    """Without marks in the template, the mask is the same: that of the template with them."""
    template = TEMPLATES[name]
    directory = make_tokenizer(tmp_path / "t", template if marked else without_marks(template))
    source = write_chats(tmp_path / "a.jsonl", CHATS)
    index = tokenize([source], directory, tmp_path / "out", chat=True, validation_fraction=0)
    assert index.loss_mask
    assert masked_documents(tmp_path / "out") == [
        expected(directory, template, chat) for chat in CHATS
    ]


def test_labels_of_windows(tmp_path: Path) -> None:
    """A label is the next token if the mask has it; where windows are cut makes no difference."""
    directory = make_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    source = write_chats(tmp_path / "a.jsonl", CHATS)
    tokenize(
        [source], directory, tmp_path / "out", chat=True, validation_fraction=0, shard_tokens=20
    )
    assert len(read_index(tmp_path / "out").splits["train"]) > 1
    documents = masked_documents(tmp_path / "out")
    labels = []
    for ids, mask in documents:
        labels += [i if m else IGNORE_INDEX for i, m in zip(ids[1:], mask[1:], strict=True)]
        labels.append(IGNORE_INDEX)
    tokens = open_tokens(tmp_path / "out", "train")
    for length in (1, 7, 16, len(tokens), len(tokens) + 9):
        count = -(-len(tokens) // length)
        read = np.concatenate([window(tokens, n, length, 300)["labels"] for n in range(count)])
        assert read[: len(labels)].tolist() == labels
        assert set(read[len(labels) :].tolist()) <= {IGNORE_INDEX}


def test_parquet_arrow_and_another_field(tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    reference = write_chats(tmp_path / "a.jsonl", CHATS)
    tokenize([reference], directory, tmp_path / "out", chat=True, validation_fraction=0)
    table = pa.table({"chats": CHATS})  # of structs, with null where a message lacks a key
    pq.write_table(table, tmp_path / "b.parquet")
    with (
        pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    sources = [
        tmp_path / "b.parquet",
        tmp_path / "c.arrow",
        write_chats(tmp_path / "d.jsonl", CHATS, "chats"),
    ]
    for number, source in enumerate(sources):
        out = tmp_path / f"{number}"
        tokenize([source], directory, out, chat=True, text_field="chats", validation_fraction=0)
        assert masked_documents(out) == masked_documents(tmp_path / "out")


def test_messages_as_share_gpt_has_them(tmp_path: Path) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [
        [{"from": names[message["role"]], "value": message["content"]} for message in chat]
        for chat in (CHATS[0], CHATS[2])
    ]
    directory = make_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    tokenize(
        [write_chats(tmp_path / "a.jsonl", [CHATS[0], CHATS[2]])],
        directory, tmp_path / "out", chat=True, validation_fraction=0,
    )  # fmt: skip
    source = write_chats(tmp_path / "b.jsonl", rows, "conversations")
    tokenize(
        [source], directory, tmp_path / "1", chat=True, text_field="conversations",
        validation_fraction=0,
    )  # fmt: skip
    assert masked_documents(tmp_path / "1") == masked_documents(tmp_path / "out")


READS_PARTS = without_marks(TEMPLATES["chatml"]).replace(
    "{{ m.content }}", "{% for part in m.content %}{{ part['text'] + '|' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEMPLATES["chatml"], READS_PARTS])
def test_content_in_parts(template: str, tmp_path: Path) -> None:
    """One text, unless the template reads parts itself."""
    said = ["a", "|", "b", "|"]
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "text", "text": t} for t in "ab"]},
    ]
    directory = make_tokenizer(tmp_path / "t", template)
    source = write_chats(tmp_path / "a.jsonl", [chat])
    tokenize([source], directory, tmp_path / "out", chat=True, validation_fraction=0)
    ((ids, mask),) = masked_documents(tmp_path / "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    text = tokenizer.decode([i for i, said in zip(ids, mask, strict=True) if said])
    assert text == ("".join(said) if template == READS_PARTS else "ab") + "<|im_end|>"


def test_a_changed_mask_is_noticed(tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    source = write_chats(tmp_path / "a.jsonl", CHATS)
    tokenize([source], directory, tmp_path / "out", chat=True, validation_fraction=0)
    data = TokenDirectory(tmp_path / "out")
    data.require_intact(["train"], 1 << 30)
    path = tmp_path / "out" / "train-00000.loss"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert "found contents with digest" in error_of(lambda: data.require_intact(["train"], 1 << 30))
    path.write_bytes(content[:-1])
    assert error_of(lambda: data.open("train")).startswith(
        f"{path}: found {len(content) - 1} bytes"
    )
    path.unlink()
    assert error_of(lambda: data.open("train")) == f"{path}: no such file, but the index lists it"


def test_an_interrupted_command_continues(tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    source = write_chats(tmp_path / "a.jsonl", CHATS * 3)
    options: dict[str, Any] = {"chat": True, "validation_fraction": 0.4, "shard_tokens": 40}
    tokenize([source], directory, tmp_path / "whole", **options)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(read: int, tokens: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        tokenize([source], directory, tmp_path / "part", **options, report=stop)
    tokenize([source], directory, tmp_path / "part", **options)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "part" / path.name).read_bytes() == path.read_bytes()
    (directory / "chat_template.jinja").write_text(TEMPLATES["llama 3"])
    message = error_of(lambda: tokenize([source], directory, tmp_path / "part", **options))
    assert message.startswith(f"{tmp_path}/part: was made with chat_template ")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "found no messages as 'messages', expected a list of messages"),
        ("text", "found str as 'messages', expected a list of messages"),
        (
            [{"speaker": "human", "text": "Hi"}],
            'message 1: found an object with speaker, text, expected {"role": ..., "content": ...}',
        ),
        (
            [{"role": "user", "content": "Hi"}, "Hello"],
            'message 2: found str, expected {"role": ..., "content": ...}',
        ),
        (
            [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}],
            "found the roles system, user, expected a turn of the assistant, on which the loss is",
        ),
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "x", "weight": 0.5},
            ],
            "message 2: found 0.5 as 'weight', expected 0 or 1",
        ),
        (
            [{"role": "assistant", "content": "x", "train_detail": [{"begin_offset": 0}]}],
            "message 1: 'train_detail' is not supported: a turn is in the loss or not",
        ),
        # Python's representation would be in the text
        (
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "x"},
            ],
            "message 1: found parts of type image, text as content, expected text",
        ),
        (
            [{"role": "user", "content": []}, {"role": "assistant", "content": "x"}],
            "message 1: found an empty list as content, expected text",
        ),
        (
            [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "x"}],
            "message 1: found nothing as content, expected text",
        ),
        (
            [{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}],
            "message 1: found int as content, expected text",
        ),
        (
            [{"role": "user", "content": "a \ud800"}, {"role": "assistant", "content": "x"}],
            "not Unicode text (surrogates not allowed)",
        ),
    ],
)
def test_rows_that_are_no_chats(messages: Any, message: str, tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    source = write_chats(tmp_path / "a.jsonl", [CHATS[0], messages])
    found = error_of(lambda: tokenize([source], directory, tmp_path / "out", chat=True))
    assert found == f"{source}, line 2: {message}"


BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # no mask is all ones, and none is all zeros
        (BARE, "all of its 5 tokens would be in the loss, expected those of the assistant's turns"),
        (
            "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + BARE,
            "none of its 5 tokens would be in the loss, expected those of the assistant's turns",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}",
            "message 2: the chat template renders it otherwise in the whole conversation, so its place is "
            "not known: mark what the assistant says with {% generation %} in the template",
        ),
        ("{{ raise_exception('no chats\nhere') }}", "chat template: no chats here"),
        ("{% if %}", "chat template: Expected an expression, got 'end of statement block'"),
    ],
)
def test_templates_that_do_not_tell_the_turns(template: str, message: str, tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "t", template)
    chat = [{"role": "assistant", "content": "!!!!!"}]
    if "length" in template:
        chat = [{"role": "user", "content": "x"}, *chat, {"role": "user", "content": "y"}]
    source = write_chats(tmp_path / "a.jsonl", [chat])
    found = error_of(lambda: tokenize([source], directory, tmp_path / "out", chat=True))
    assert found == f"{source}, line 1: {message}"


def test_what_else_is_refused(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "a.jsonl", CHATS)
    directory = make_tokenizer(tmp_path / "bare", None)
    assert error_of(lambda: tokenize([source], directory, tmp_path / "out", chat=True)).startswith(
        f"{directory}: no chat template; expected chat_template.jinja"
    )
    directory = make_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    text = tmp_path / "b.txt"
    text.write_text("Hi")
    assert error_of(lambda: tokenize([text], directory, tmp_path / "o2", chat=True)) == (
        f"{text}: is plain text, expected chats in JSON lines, Parquet or Arrow"
    )


@pytest.mark.parametrize("name", ["weight", "loss_mask", "training", "loss"])
@pytest.mark.parametrize("marked", [True, False])
def test_turns_that_are_not_to_be_learned(marked: bool, name: str, tmp_path: Path) -> None:
    """The mask is that of transformers without the turns that a message takes out of the loss."""
    template = TEMPLATES["chatml"]
    directory = make_tokenizer(tmp_path / "t", template if marked else without_marks(template))
    flagged = [dict(message) for message in CHATS[2]]
    flagged[1][name] = 0 if name in ("weight", "loss_mask") else False
    flagged[3][name] = None if name == "loss" else 1
    source = write_chats(tmp_path / "a.jsonl", [flagged])
    tokenize([source], directory, tmp_path / "out", chat=True, validation_fraction=0)
    ids, mask = expected(directory, template, CHATS[2])
    first = mask.index(1)
    stop = mask.index(0, first)
    mask[first:stop] = [0] * (stop - first)
    assert 1 in mask
    assert masked_documents(tmp_path / "out") == [(ids, mask)]


def test_blocks_that_are_not_turns_cannot_be_left_out(tmp_path: Path) -> None:
    content = "{{ m.content }}"
    both = TEMPLATES["chatml"].replace(content, content + "{% endgeneration %} {% generation %}", 1)
    directory = make_tokenizer(tmp_path / "t", both)
    rows = [{**message, "weight": 0} if n == 1 else message for n, message in enumerate(CHATS[2])]
    source = write_chats(tmp_path / "a.jsonl", [rows])
    assert error_of(lambda: tokenize([source], directory, tmp_path / "out", chat=True)) == (
        f"{source}, line 1: has turns of the assistant that are not to be learned, and the chat template "
        "marks 4 parts of 2 turns, expected one of each"
    )


TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"a": {"type": "integer"}}},
    },
    {"type": "function", "function": {"name": "now", "parameters": {"zone": {"type": "string"}}}},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("marked", [True, False])
def test_what_a_row_has_beside_its_messages(marked: bool, suffix: str, tmp_path: Path) -> None:
    """Tools, variables of the template and a system prompt, as transformers renders them."""
    template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{{ mood }}"
        + TEMPLATES["chatml"]
    )
    directory = make_tokenizer(tmp_path / "t", template if marked else without_marks(template))
    rows: list[dict[str, Any]] = [
        {"messages": CHATS[0], "tools": TOOLS, "chat_template_kwargs": {"mood": "glad"}},
        {"messages": CHATS[2], "system": "Be brief."},
    ]
    source = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        rows.append({"messages": CHATS[0], "tools": json.dumps(TOOLS), "system": ""})
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = ("messages", "tools", "chat_template_kwargs", "system")
        columns = {name: [row.get(name) for row in rows] for name in names}
        pq.write_table(pa.table(columns), source)
    tokenize([source], directory, tmp_path / "out", chat=True, validation_fraction=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    documents = []
    for row in rows:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        out = tokenizer.apply_chat_template(
            system + row["messages"],
            tools=TOOLS if "tools" in row else None,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **row.get("chat_template_kwargs", {}),
        )
        documents.append((out["input_ids"], out["assistant_masks"]))
    assert masked_documents(tmp_path / "out") == documents


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "{"}, "tools: not valid JSON (Expecting property name"),
        ({"tools": {"name": "f"}}, "found 'tools' that is no list of objects, expected one"),
        ({"chat_template_kwargs": "x"}, "found str as 'chat_template_kwargs', expected an object"),
        (
            {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs: found 'messages', expected other names",
        ),
        ({"system": ["x"]}, "found list as 'system', expected text"),
        (
            {"messages": CHATS[1], "system": "Be kind."},
            "found 'system' and a first message of the system, expected one of them",
        ),
    ],
)
def test_wrong_fields_beside_the_messages(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = make_tokenizer(tmp_path / "t", TEMPLATES["chatml"])
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"messages": CHATS[0]} | fields) + "\n")
    found = error_of(lambda: tokenize([source], directory, tmp_path / "out", chat=True))
    assert found.startswith(f"{source}, line 1: {message}")


def test_many_long_chats_are_rendered_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of time and memory are those of one conversation."""
    sizes: list[int] = []

    def limited(template: str, jobs: list[Any], **options: Any) -> Any:
        sizes.append(len(jobs))
        if len(jobs) > 12:
            raise ValueError("chat template: stopped, because it needs more than 10 s or 1024 MiB")
        return render_chats(template, jobs, **options)

    monkeypatch.setattr(chat, "render_chats", limited)
    for marked in (True, False):
        template = TEMPLATES["llama 3"] if marked else without_marks(TEMPLATES["llama 3"])
        rows = [Chat(f"{n}", messages) for n, messages in enumerate(CHATS * 4)]
        rendered = list(chat.render(chat.Template(template, {}, frozenset()), rows))
        jobs = [{"messages": row.messages, "add_generation_prompt": False} for row in rows]
        assert [one.text for one in rendered] == render_chats(template, jobs)
    assert max(sizes) > 12
    monkeypatch.setattr(chat, "render_chats", lambda *a, **o: limited("", [0] * 13))
    assert error_of(lambda: list(chat.render(chat.Template("x", {}, frozenset()), rows))) == (
        "0: chat template: stopped, because it needs more than 10 s or 1024 MiB"
    )
