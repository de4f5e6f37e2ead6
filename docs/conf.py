"""Configuration of the documentation site; built by `make docs`.

The source folder is the repository, so that the links of a page work both in the site and where the files are read as
they are: pages under `docs/` link to results, recipes and source files by relative paths.
"""

import fnmatch
import itertools
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import research  # noqa: E402  (found by the path above)

project = "Nestax"
author = "The Nestax authors"
copyright = "The Nestax authors, Apache-2.0"
version = release = research.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["docs/**.md", "results/**.md", "README.md", "WORKSPACE.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [
    ".*",
    "build",
    "runs",
    "dist",
    "third_party",
    "research",
    "launch",
    "tests",
    "configs",
    "**/__pycache__",
]
root_doc = "docs/index"
toc_object_entries = False
suppress_warnings = [
    "toc.not_included",  # results and the files of the root are reached by links, not by the menu
    "ref.python",  # the name of a documented attribute is taken for a reference, and several classes may have it
]

html_theme = "furo"
html_title = "Nestax"
html_copy_source = False
html_extra_path = ["_site"]
html_theme_options = {"navigation_with_keys": True}

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_maximum_signature_line_length = 100

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
CODE = re.compile(r"``[^`]+``|`[^`]+`")
CODE_INDENT = "    "
COLON = "\ue000"


def inline(text: str) -> str:
    """Returns text of a docstring with code between single backquotes as reStructuredText has it, and signs that mean
    something there escaped."""
    out, at = [], 0
    for found in CODE.finditer(text):
        out += [escaped(text[at : found.start()]), f"``{found.group(0).strip('`').strip()}``"]
        at = found.end()
    return "".join([*out, escaped(text[at:])])


def escaped(text: str) -> str:
    return re.sub(r"([\\*|_`])", r"\\\1", text)


def docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Translates a docstring, plain text with code between single backquotes, whose indented lines before the section
    of arguments are code."""
    del app, name, obj, options
    start = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
    out: list[str] = []
    for code, group in itertools.groupby(lines[:start], lambda line: line.startswith(CODE_INDENT)):
        block = list(group)
        out += ["", "::", "", *block, ""] if code else inline("\n".join(line.strip() for line in block)).split("\n")
    lines[:] = [*out, *inline("\n".join(lines[start:])).split("\n")]
    if what in ("attribute", "data"):  # napoleon would take what stands before a colon for the type
        lines[:] = [line.replace(":", COLON) for line in lines]


def restore_colons(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def short_types(app, doctree: nodes.document) -> None:
    """Array types are called `Array`, without the module that JAX hides them in."""
    for reference in doctree.findall(addnodes.pending_xref):
        if reference.get("reftarget", "").startswith("jaxlib."):
            reference[:] = [nodes.Text(reference["reftarget"].rsplit(".", 1)[-1])]


API = re.compile(r"^<!-- api: (.+) -->$", re.MULTILINE)
NAMES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "research").rglob("*.py"))


def api(app, docname: str, source: list[str]) -> None:
    """Puts the documentation of all modules whose names match in the place of `<!-- api: PATTERN PATTERN -->`."""
    del app

    def sections(found: re.Match) -> str:
        names = [name for pattern in found.group(1).split() for name in fnmatch.filter(NAMES, pattern)]
        if not names:
            raise ValueError(f"{docname}: no module matches {found.group(1)}")
        names = [name.removesuffix(".__init__") for name in names]
        return "\n".join(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in names)

    source[0] = API.sub(sections, source[0])


class ConfigFields(Directive):
    """A table of every field of a run's configuration, with default and meaning."""

    def run(self) -> list[nodes.Node]:
        from research.train.config import base_config, value_of
        from research.train.sections import FIELDS

        defaults = base_config().to_dict()
        rows = [(name, repr(value_of(defaults, name)), field.meaning) for name, field in FIELDS.items()]
        return [table(("field", "default", "meaning"), rows, code=(0, 1))]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], code: tuple[int, ...]) -> nodes.table:
    """Returns a table; the columns of `code` are set as code."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]

    def row(cells, plain):
        entries = (
            nodes.entry(
                "", nodes.paragraph("", "", nodes.literal(text=c) if i in code and not plain else nodes.Text(c))
            )
            for i, c in enumerate(cells)
        )
        return nodes.row("", *entries)

    group += nodes.thead("", row(head, True))
    group += nodes.tbody("", *(row(cells, False) for cells in rows))
    return nodes.table("", group)


def setup(app) -> dict[str, bool]:
    app.connect("source-read", api)
    app.connect("autodoc-process-docstring", docstring, priority=400)
    app.connect("autodoc-process-docstring", restore_colons, priority=600)
    app.connect("doctree-read", short_types)
    app.add_directive("config-fields", ConfigFields)
    return {"parallel_read_safe": True}
