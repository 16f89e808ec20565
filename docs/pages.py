"""Adds to the site of docs/ what is written elsewhere: the README as its first page, the changelog
and the rules of contributing, each tool's help, the configs, and the notebooks. Hooks of MkDocs,
named in mkdocs.yml.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
_AROUND = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that have no file in docs/."""
    made = {name: (ROOT / name).read_text() for name in _AROUND}
    made["commands.md"] = _commands()
    configs = sorted((ROOT / "configs").rglob("*.py"), key=lambda path: (path.parent, path))
    made["configs.md"] = _configs(configs)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        made[f"notebooks/{path.stem}.md"] = _notebook(path)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for path in configs:
        page = File.generated(
            config,
            path.relative_to(ROOT).with_suffix(".md").as_posix(),
            content=f"# {path.relative_to(ROOT)}\n\n```python\n{path.read_text()}```\n",
            inclusion=InclusionLevel.NOT_IN_NAV,
        )
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages."""
    if page.file.src_uri in _AROUND:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        markdown = re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)
    return re.sub(r"\]\((?:\.\./)?(configs/[\w/]+)\.py\)", r"](\1.md)", markdown)


def _notebook(path: Path) -> str:
    """Returns the page of a notebook: its prose and code, without outputs."""
    parts = [f"*This page is `{path.relative_to(ROOT)}`.*"]
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts[:2] = parts[1::-1]  # the title first
    return "\n\n".join(parts) + "\n"


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def _commands() -> str:
    """Returns the page of all tools: the docstring of each, which its --help prints too."""
    parts = [
        "# Commands\n\nWhere the package is installed, `dsjax NAME` is `python tools/NAME.py`. "
        "Each explains its arguments: `--help`."
    ]
    for path in sorted((ROOT / "tools").glob("*.py")):
        what, _, rest = _docstring(path).partition("\n\n")
        parts.append(f"## {path.stem}\n\n{what}\n\n```text\n{rest}\n```")
    return "\n\n".join(parts) + "\n"


def _configs(paths: list[Path]) -> str:
    """Returns the page of all configs: a line of each and a link to its source."""
    parts = ["# Configs\n\nEach is a Python file, whose docstring says what it costs and gives."]
    folder = None
    for path in paths:
        if path.parent != folder:
            folder = path.parent
            parts.append(f"\n## {folder.relative_to(ROOT)}\n\n| file | what |\n|---|---|")
        what = re.split(r"(?<=[.:])\s|\n\n", _docstring(path))[0].replace("\n", " ")
        name = path.relative_to(ROOT).with_suffix("")
        parts.append(f"| [{path.stem}]({name.as_posix()}.md) | {what.rstrip(':')} |")
    return "\n".join(parts) + "\n"
