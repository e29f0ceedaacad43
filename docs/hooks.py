"""Hooks of the documentation build: generated pages, and a check that every public name is documented."""

import base64
import json
import logging
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ("llama_jax", "llama_jax.loss", "llama_jax.scoring")
log = logging.getLogger("mkdocs.hooks")  # a warning fails the build, since it is strict


def on_config(config: MkDocsConfig) -> None:
    """Compare docs/api.md with what the public modules export."""
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    exported = public_names()
    for name in sorted(exported - documented):
        log.warning("%s is public, but docs/api.md does not have it", name)
    for name in sorted(documented - exported):
        log.warning("%s is in docs/api.md, but is not public", name)


def public_names() -> set[str]:
    """Dotted names of everything public, once each. Warns about names without a docstring."""
    package = griffe.load("llama_jax", search_paths=[ROOT], resolve_aliases=True)
    names: dict[str, str] = {}  # where it is defined: the shortest public name
    for module_name in PUBLIC:
        module = package if module_name == "llama_jax" else package[module_name[10:]]
        for name in module.exports or []:
            public = module[str(name)]
            if not public.has_docstring:
                log.warning("%s.%s is public, but has no docstring", module_name, name)
            names.setdefault(public.canonical_path, f"{module_name}.{name}")
    return set(names.values())


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages whose text is kept elsewhere in the repository."""
    for source in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / source).read_text()
        files.append(File.generated(config, source.lower(), content=text))
    notebook = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text())
    page, pictures = render(notebook)
    files.append(File.generated(config, "first_hour.md", content=page))
    for name, picture in pictures.items():
        files.append(File.generated(config, name, content=picture))


def render(notebook: dict) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs, as Markdown and PNG files."""
    blocks, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"first_hour_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                blocks.append(f"![Output of the cell above]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                blocks.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(blocks), pictures
