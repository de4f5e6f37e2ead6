"""The documents of the repository, and what stands in them: links, headings, code, commands, tables."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "WORKSPACE.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
GUIDES = {
    "mixer": "add-a-mixer",
    "model": "add-a-model",
    "data": "add-a-data-set",
    "optimizer": "add-an-optimizer",
    "task": "add-a-task",
    "method": "add-a-method",
    "benchmark": "add-a-benchmark",
    "learner": "add-a-learner",
}
"""Component -> the page of docs/how-to/ whose first block of Python is a complete file that adds it."""
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    """Returns the name of a document for the ids of tests."""
    return str(path.relative_to(ROOT))


def links(text: str) -> list[str]:
    """Returns the targets of the links and pictures of a page."""
    return LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the documentation site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def python_blocks(text: str) -> list[str]:
    """Returns the blocks of Python of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def guide(part: str) -> list[str]:
    """Returns the blocks of Python of the guide to a component."""
    return python_blocks((ROOT / f"docs/how-to/{GUIDES[part]}.md").read_text())


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Yields (command, the rest of its line) of every `python -m launch.COMMAND ...` of a page, lines that go on
    joined."""
    for line in text.replace("\\\n", " ").splitlines():
        yield from re.findall(r"-m launch\.(\w+)((?:(?!-m launch\.)[^`#])*)", line)


def rows(text: str, head: str) -> list[list[str]]:
    """Returns the cells of the table whose first line begins so, without head and rule."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head)) + 2
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[start:end]]
