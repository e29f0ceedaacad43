"""Chat templates: messages to text, as transformers' `apply_chat_template` renders them.

A template is a stranger's program. It runs in jinja2's immutable sandbox, which keeps it from Python, and
in a process of its own (this file as a script), which keeps it from running forever or filling the memory.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS, BYTES = 10, 1 << 30  # of computing and of memory
_REFUSED = 3  # exit code of the child where the template is at fault


def find_chat_template(directory: str | Path) -> tuple[str, dict[str, str]]:
    """The template of a Hugging Face directory, and the special tokens that it may name.

    Of several templates the one called "default", see `chat_templates`.

    Returns:
        The template, and text by name (bos_token, ...): all the special tokens that transformers has.

    Raises:
        ValueError: there is none, or none is the default; files that are damaged.
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
            f"{directory}: found no chat template, expected chat_template.jinja or one in "
            "tokenizer_config.json"
        )
    if "default" not in templates:
        names = ", ".join(map(repr, sorted(templates)))
        raise ValueError(
            f"{directory}: found chat templates {names}, expected one called 'default'"
        )
    return templates["default"], tokens


def chat_templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """The chat templates among the files of a directory, by name; a single one is called "default".

    As in transformers, `chat_template.jinja` and `additional_chat_templates/NAME.jinja` go before
    tokenizer_config.json; that goes before `chat_template.json`, which transformers has for processors.

    Args:
        files: content by relative path.

    Raises:
        ValueError: templates that are no text, or JSON that is damaged.
    """
    from llama_jax.text.companions import TEMPLATES
    from llama_jax.text.tokenizer_files import CONFIG, TEMPLATE, json_file

    found = {}
    for name, content in files.items():
        if name == TEMPLATE:
            found["default"] = _lines(name, content)
        elif name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja"):
            short = name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja")
            found[short] = _lines(name, content)
    for name in (CONFIG, "chat_template.json"):
        field: Any = None if found else json_file(files, name).get("chat_template")
        if isinstance(field, str):
            found = {"default": field}
        elif isinstance(field, list) and all(isinstance(entry, dict) for entry in field):
            field = {entry.get("name"): entry.get("template") for entry in field}
        if field is not None and not found:
            pairs: Any = field.items() if isinstance(field, dict) else [(None, None)]
            if not all(isinstance(text, str) for pair in pairs for text in pair):
                raise ValueError(
                    f"{name}: chat_template: found a {type(field).__name__}, expected text, or a "
                    "list of templates with their names"
                )
            found = dict(pairs)
    return found


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
    """The text of a conversation, special tokens included: encode it without adding any.

    Args:
        messages: of "role" and "content", and whatever else the template looks at; None counts as absent.
        special_tokens: text by name (bos_token, ...), see `find_chat_template`.
        variables: tools, documents and others, as JSON has them.

    Raises:
        ValueError: a template that is none, raises, reaches for Python, or takes too much time or memory;
            jinja2 is not installed.
    """
    values = {"tools": None, "documents": None} | dict(special_tokens or {}) | variables
    values |= {
        "messages": [_message(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        child = subprocess.run(
            (sys.executable, "-P", __file__),
            input=json.dumps({"template": template, "values": values}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=2 * SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        child = None
    if child is not None and child.returncode == _REFUSED:
        raise ValueError(f"chat template: {child.stdout}")
    if child is None or child.returncode:
        raise ValueError(
            f"chat template: found one that does not end, expected at most {SECONDS} s and "
            f"{BYTES >> 20} MiB"
        )
    return json.loads(child.stdout)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it over: without nulls, and its reasoning under each usual name."""
    given = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((given[name] for name in names if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def render_here(template: str, values: Mapping[str, Any]) -> str:
    """What `render_chat` does, in this process and without limits. Raises jinja2's errors."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant says; the text is that of its body."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

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
    return environment.from_string(template).render(**values)


def _child() -> int:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    given = json.load(sys.stdin)
    try:
        text = render_here(given["template"], given["values"])
    except ImportError:
        reason = "jinja2 is not installed, expected the extra: pip install 'llama-jax[generate]'"
    except (MemoryError, RecursionError):
        return 1
    except Exception as error:  # whatever a template may raise
        reason = " ".join(str(error).split()) or type(error).__name__
    else:
        json.dump(text, sys.stdout)
        return 0
    sys.stdout.write(reason)
    return _REFUSED


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(_child())
