"""Tables for documents, terminals and files; numbers for people; Pareto fronts and hypervolume.

A row is a dict. Columns are keys, in the order to show; a key that a row lacks, None and NaN show as an empty cell or
"-".
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.files import write_text

MADE_BY = "# made by: "
Row = Mapping[str, Any]

# Heading and unit of the columns that every report has; any other key is its own heading.
HEADINGS = {
    "name": "sub-network",
    "params": "parameters",
    "flops": "FLOPs",
    "latency_ms": "latency",
    "peak_memory_bytes": "memory",
    "state": "state",
}


def human_count(number: float, unit: str = "") -> str:
    """Three digits and a suffix, e.g. 1234567 -> "1.23 M", (45_600_000, "FLOPs") -> "45.6 MFLOPs", 950 -> "950"."""
    digits, suffix = _scaled(number, 1000, ("", "k", "M", "G", "T", "P", "E"))
    return f"{digits} {suffix}{unit}".strip()


def human_bytes(number: float) -> str:
    """Binary units, e.g. 1536 -> "1.50 KiB", 3 * 2**20 -> "3.00 MiB"."""
    digits, suffix = _scaled(number, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi"))
    return f"{digits} {suffix}B"


def human_ms(milliseconds: float) -> str:
    """Three digits in a fitting unit, e.g. 0.0123 -> "12.3 us", 4.56 -> "4.56 ms", 12345 -> "12.3 s"."""
    if abs(milliseconds) < 1 and milliseconds:
        return f"{_three_digits(milliseconds * 1e3)} us"
    if abs(milliseconds) >= 1e3:
        return f"{_three_digits(milliseconds / 1e3)} s"
    return f"{_three_digits(milliseconds)} ms"


def _scaled(number: float, base: int, suffixes: Sequence[str]) -> tuple[str, str]:
    power = 0
    # 999.5 already rounds to four digits; in binary units the step to the next suffix is at 1024.
    while abs(number) >= (999.5 if base == 1000 else base) and power < len(suffixes) - 1:
        number, power = number / base, power + 1
    if power == 0 and float(number).is_integer():
        return str(int(number)), ""
    return _three_digits(number), suffixes[power]


def _three_digits(number: float) -> str:
    size = abs(number)
    return f"{number:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def format_cell(key: str, value: Any) -> str:
    """One cell for people: the unit follows from the column's key (`params`, `flops`, `*_ms`, `*_bytes`, `*_s`)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, (str, bool)):
        return str(value)
    if key == "params":
        return human_count(value)
    if key in ("flops", "macs"):
        return human_count(value, "FLOPs" if key == "flops" else "MACs")
    if key.endswith("_ms"):
        return human_ms(value)
    if key.endswith("_bytes"):
        return human_bytes(value)
    if key.endswith("_s"):
        return human_ms(1e3 * value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: Iterable[Row], columns: Sequence[str] | Mapping[str, str]) -> str:
    """A GitHub table, numbers to the right. `columns`: keys, or key to heading. Ends with a newline."""
    heads, cells, right = _grid(rows, columns)
    cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    rule = ["---:" if is_number else "---" for is_number in right]
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, rule, *cells])


def text_table(rows: Iterable[Row], columns: Sequence[str] | Mapping[str, str]) -> str:
    """The same table aligned with spaces, for a terminal. Ends with a newline."""
    heads, cells, right = _grid(rows, columns)
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "".join("  ".join(map(_pad, line, widths, right)).rstrip() + "\n" for line in lines)


def _pad(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _grid(
    rows: Iterable[Row], columns: Sequence[str] | Mapping[str, str]
) -> tuple[list[str], list[list[str]], list[bool]]:
    """Headings, formatted cells, and whether each column holds only numbers."""
    rows = list(rows)
    titles = columns if isinstance(columns, Mapping) else {key: HEADINGS.get(key, key) for key in columns}
    cells = [[format_cell(key, row.get(key)) for key in titles] for row in rows]
    right = [all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key in titles]
    return list(titles.values()), cells, right


def write_csv(
    path: str | os.PathLike,
    rows: Iterable[Row],
    command: str,
    columns: Sequence[str] | None = None,
    header: Mapping[str, str] | None = None,
) -> Path:
    """Writes rows at full precision under a first line `# made by: COMMAND`, atomically; None becomes an empty cell.

    Args:
      columns: by default every key of any row, in order of first appearance.
      header: further comment lines, `# key: value` each.
    """
    rows, path = list(rows), Path(path)
    columns = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    text.write(f"{MADE_BY}{' '.join(command.split())}\n")
    text.writelines(f"# {key}: {' '.join(value.split())}\n" for key, value in (header or {}).items())
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return path


def write_both(
    folder: str | os.PathLike, name: str, rows: Iterable[Row], shown: Iterable[Row], command: str, note: str = ""
) -> None:
    """Writes rows as NAME.csv, and what is shown of them as a table under "Made by COMMAND" and a note in NAME.md."""
    write_csv(Path(folder) / f"{name}.csv", rows, command)
    shown = list(shown)
    text = f"Made by `{command}`{f'; {note}' if note else ''}.\n\n{markdown_table(shown, list(shown[0]))}"
    write_text(Path(folder) / f"{name}.md", text)


def read_csv(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a CSV, comment lines before the header skipped; cells as int, float, None where empty, else str."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = file.readlines()
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [{key: _parse(cell) for key, cell in row.items()} for row in csv.DictReader(lines[start:])]


def _parse(cell: str | None) -> Any:
    if not cell:
        return None
    for kind in (int, float):
        try:
            return kind(cell) if "_" not in cell else cell  # Python reads "1_000" as a number; it is a name here
        except ValueError:
            continue
    return cell


def pareto(rows: Iterable[Row], cost_key: str, value_key: str, *, higher_is_better: bool = True) -> list[Row]:
    """The rows that no other dominates (cheaper or equal, better or equal, and one of the two strictly), by rising
    cost.

    Rows without a finite cost or value are left out; of equal rows all stay.
    """
    sign = 1 if higher_is_better else -1
    known = [row for row in rows if is_finite(row.get(cost_key)) and is_finite(row.get(value_key))]
    front: list[Row] = []
    for row in sorted(known, key=lambda row: (row[cost_key], -sign * row[value_key])):
        last = front[-1] if front else None
        if (
            last is None
            or sign * row[value_key] > sign * last[value_key]
            or (row[cost_key], row[value_key]) == (last[cost_key], last[value_key])
        ):
            front.append(row)
    return front


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area between the front of `points` and `reference`, both objectives minimised.

    Points at or beyond the reference in either objective add nothing. Example: (0.2, 0.6), (0.5, 0.3) under (1, 1):
    0.47.
    """
    area, ceiling = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area
