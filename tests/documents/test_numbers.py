"""Every number of a results table in the documents stands in the file that the table names.

A table of measurements has a comment above it, `<!-- numbers: FILE FILE -->`, or links in its rows to the pages of
results; tables that hold no measurement say so by `<!-- no measurements -->`. A number that is shown to n digits must
be the rounding of one of the file's, in the row that has the same name where there is one; percents, thousands (k, M,
G) and milli- and microseconds are read as such.
"""

import csv
import math
import re

import pytest

from tests.documents.pages import DOCUMENTS, ROOT

NUMBER = re.compile(
    r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?:\s?(%|k\b|M\b|G\b|MFLOPs|kFLOPs|GFLOPs|ms\b|us\b|min\b))?"
)
SCALES = {
    "%": 100,
    "k": 1e-3,
    "kFLOPs": 1e-3,
    "M": 1e-6,
    "MFLOPs": 1e-6,
    "G": 1e-9,
    "GFLOPs": 1e-9,
    "ms": 1,
    "us": 1e3,
    "min": 1 / 60,
}
COMMENT = re.compile(r"<!-- (no measurements|numbers: ([^>]+?)) -->")
LINK = re.compile(r"\]\((?:\.\./)*(results/[^)#]+)\)")


def numbers(text):
    """Yields (the number, half a unit of its last digit, the scales that a source's number may be shown in)."""
    for found in NUMBER.finditer(text):
        unit = found.group(1)
        digits = found.group(0).removesuffix(unit or "").strip().replace(",", "")
        mantissa, _, exponent = digits.partition("e")
        half = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        yield float(digits), half, (SCALES[unit],) if unit else (1, 100)


def rows_of(path):
    """Returns (the row's texts, the row's numbers) of every line of a CSV or a page."""
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        lines = [line for line in lines if not line.startswith("#")]
        return [([c.strip() for c in cells], [x for c in cells for x in values(c)]) for cells in csv.reader(lines)]
    out = []
    for line in lines:
        plain = [value / scales[0] for value, _, scales in numbers(line)]
        out.append(([c.strip(" `*") for c in line.strip("| ").split("|")], plain + [v for v, _, _ in numbers(line)]))
    return out


def values(cell):
    """The numbers of a CSV's cell: the cell itself, or those in its text."""
    try:
        value = float(cell)
    except ValueError:
        return [number for number, _, _ in numbers(cell)]
    return [value] if math.isfinite(value) else []


def tables(path):
    """Yields (line number, comment, the table's rows as lists of cells) of every table with a digit in its body."""
    lines, comment, at = path.read_text().splitlines(), None, 0
    while at < len(lines):
        if found := COMMENT.search(lines[at]):
            comment = found
        if lines[at].startswith("#"):
            comment = None
        if lines[at].startswith("|"):
            start = at
            while at < len(lines) and lines[at].startswith("|"):
                at += 1
            body = [[c.strip() for c in line.strip().strip("|").split("|")] for line in lines[start + 2 : at]]
            if any(re.search(r"\d", cell) for row in body for cell in row):
                yield start + 1, comment, body
            comment = None
        at += 1


def cases():
    for path in DOCUMENTS:
        for line, comment, body in tables(path):
            yield pytest.param(path, comment, body, id=f"{path.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("path, comment, body", cases())
def test_every_number_of_a_table_stands_in_its_file(path, comment, body):
    if comment is not None and comment.group(1) == "no measurements":
        return
    named = comment.group(2).split() if comment is not None else []
    missing = []
    for row in body:
        linked = [name for cell in row for name in LINK.findall(cell)]
        # A page of benchmarks has its figures beside it, at full precision.
        linked += [
            beside for name in linked if (ROOT / (beside := name.removesuffix(".md") + "_thresholds.csv")).is_file()
        ]
        files = named or linked
        assert files, f"{path.name}: the table with the row {row} names no file of results"
        sources = [entry for name in files for entry in rows_of(ROOT / name)]
        label = row[0].strip("` ")
        same = [entry for entry in sources if label in entry[0]]
        # Means and differences over the rows stand in other lines of the page.
        candidates = [value for _, found in same or sources for value in found]
        for cell in row[1:]:
            text = LINK.sub("", cell)
            for value, half, scales in numbers(text):
                if not any(abs(c * s - value) <= half * 1.02 + 1e-12 * abs(value) for c in candidates for s in scales):
                    missing.append(f"{label}: {value:g}")
    assert not missing, f"not in {', '.join(files)}: {missing[:5]}"


def test_the_check_finds_a_wrong_number(tmp_path):
    """Shown on rows of which some have a wrong digit, or another network's number."""
    source = tmp_path / "x.csv"
    source.write_text("# made by: x\nname,accuracy,params\nfull,0.92764,508123\nhalf,0.9149,130000\n")
    for cell, fine in (("92.76 %", True), ("92.77 %", False), ("508 k", True), ("509 k", False), ("91.49 %", False)):
        value, half, scales = next(numbers(cell))
        own = next(found for names, found in rows_of(source) if "full" in names)
        assert any(abs(c * s - value) <= half * 1.02 for c in own for s in scales) == fine
