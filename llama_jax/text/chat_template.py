"""Chat templates: messages to text, as transformers' `apply_chat_template` renders them.

A template is untrusted code. It runs in jinja2's immutable sandbox, without access to Python, and in a
child process (this file as a script) with limits on time and memory.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS, BYTES = 10, 1 << 30  # limits on CPU time and memory


def find_chat_template(directory: str | Path) -> tuple[str, dict[str, str]]:
    """The default chat template of a Hugging Face directory, and the special tokens that it may use.

    Returns:
        The template, and the special tokens by name (bos_token, ...).

    Raises:
        ValueError: no template, or none called "default"; damaged files.
    """
    from llama_jax.text.tokenizer import special_tokens
    from llama_jax.text.tokenizer_files import read_files

    files = read_files(directory)
    try:
        templates = chat_templates(files)
        tokens = special_tokens(files)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    if not templates:
        raise ValueError(
            f"{directory}: no chat template; expected chat_template.jinja, or chat_template in "
            "tokenizer_config.json"
        )
    if "default" not in templates:
        names = ", ".join(map(repr, sorted(templates)))
        raise ValueError(
            f"{directory}: found chat templates {names}, expected one called 'default'"
        )
    return templates["default"], tokens


def chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Chat templates by name; a single one is called "default".

    As in transformers, `chat_template.jinja` and `additional_chat_templates/NAME.jinja` take precedence
    over tokenizer_config.json, and that over `chat_template.json`, which transformers uses for processors.

    Args:
        files: content by relative path.

    Raises:
        ValueError: a template that is not text, or damaged JSON.
    """
    from llama_jax.text.companions import TEMPLATES
    from llama_jax.text.tokenizer_files import CONFIG, TEMPLATE, json_file

    templates = {}
    for name, content in files.items():
        if name == TEMPLATE:
            templates["default"] = _lines(name, content)
        elif name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja"):
            short = name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja")
            templates[short] = _lines(name, content)
    for name in (CONFIG, "chat_template.json"):
        field: Any = None if templates else json_file(files, name).get("chat_template")
        if isinstance(field, str):
            templates = {"default": field}
        elif isinstance(field, list) and all(isinstance(entry, dict) for entry in field):
            field = {entry.get("name"): entry.get("template") for entry in field}
        if field is not None and not templates:
            pairs: Any = field.items() if isinstance(field, dict) else [(None, None)]
            if not all(isinstance(text, str) for pair in pairs for text in pair):
                raise ValueError(
                    f"{name}: chat_template: found a {type(field).__name__}, expected text, or a "
                    "list of templates with their names"
                )
            templates = dict(pairs)
    return templates


def _lines(name: str, content: bytes) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text files


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation. It contains special tokens, so encode it without adding any.

    Args:
        messages: each with "role" and "content", and whatever else the template uses; a value of None
            counts as absent.
        special_tokens: text by name (bos_token, ...), see `find_chat_template`.
        variables: tools, documents and others, which must be JSON values.

    Raises:
        ValueError: the template is invalid, raises an error, accesses Python, or needs too much time or
            memory; or jinja2 is not installed.

    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> render_chat(template, [{"role": "user", "content": "Hi!"}])
    '<user>Hi!'
    """
    job = {"messages": messages, "add_generation_prompt": add_generation_prompt} | variables
    (text,) = render_chats(template, [job], special_tokens=special_tokens)
    if isinstance(text, ValueError):
        raise text
    return text


def render_chats(
    template: str,
    chats: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str] | None = None,
    marks: tuple[str, str] = ("", ""),
) -> list[str | ValueError]:
    """As `render_chat` for many conversations, in one child process; each an own text or error.

    Args:
        chats: the variables of each: "messages", "add_generation_prompt" and others, JSON values.
        marks: texts to put around each `{% generation %}` block.

    Raises:
        ValueError: they need too much time or memory together.
    """
    values = [
        {"tools": None, "documents": None}
        | dict(special_tokens or {})
        | dict(chat)
        | {"messages": [_message(message) for message in chat["messages"]]}
        for chat in chats
    ]
    try:
        child = subprocess.run(
            (sys.executable, "-P", __file__),
            input=json.dumps({"template": template, "values": values, "marks": marks}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=2 * SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        child = None
    if child is None or child.returncode:
        raise ValueError(
            f"chat template: stopped, because it needs more than {SECONDS} s or {BYTES >> 20} MiB"
        )
    return [
        text if reason is None else ValueError(f"chat template: {reason}")
        for text, reason in json.loads(child.stdout)
    ]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers passes it on: without nulls, reasoning under both usual names."""
    fields = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((fields[name] for name in names if name in fields), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def render_here(template: str, values: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
    """As `render_chat`, in this process and without limits. Raises jinja2's errors."""
    return _compile(template, marks).render(**values)


def _compile(template: str, marks: tuple[str, str]) -> Any:
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; it renders its body."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marks == ("", ""):
                return jinja2.nodes.Scope(body).set_lineno(line)
            call = self.call_method("_marked")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)


def _child() -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    job = json.load(sys.stdin)
    try:
        results = [*_results(job)]
    except (MemoryError, RecursionError):
        return 1
    json.dump(results, sys.stdout)
    return 0


def _results(job: Mapping[str, Any]) -> Iterator[tuple[str | None, str | None]]:
    """The text of each conversation, or why there is none."""
    compiled, reason = None, None
    try:
        compiled = _compile(job["template"], tuple(job["marks"]))
    except ImportError:
        reason = "jinja2 is not installed: pip install 'llama-jax[generate]'"
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # jinja2 has several
        reason = _line(error)
    for values in job["values"]:
        if compiled is None:
            yield None, reason
            continue
        try:
            yield compiled.render(**values), None
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # a template may raise anything
            yield None, _line(error)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(_child())
