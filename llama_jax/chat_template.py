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

    `chat_template.jinja` goes before tokenizer_config.json, as in transformers; of several, "default".

    Raises:
        ValueError: there is none.
    """
    directory = Path(directory)
    config: dict[str, Any] = {}
    if (path := directory / "tokenizer_config.json").is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path}: found a JSON {type(config).__name__}, expected an object")
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8"), tokens
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ValueError(
            f"{directory}: found no chat template, expected chat_template.jinja or one in "
            "tokenizer_config.json"
        )
    return template, tokens


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
        messages: of "role" and "content", and whatever else the template looks at.
        special_tokens: text by name (bos_token, ...), see `find_chat_template`.
        variables: tools, documents and others, as JSON has them.

    Raises:
        ValueError: a template that is none, raises, reaches for Python, or takes too much time or memory;
            jinja2 is not installed.
    """
    values = {"tools": None, "documents": None} | dict(special_tokens or {}) | variables
    values |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
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
