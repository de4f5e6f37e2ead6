"""Pairs of texts of three domains, for tests."""

import json
from pathlib import Path

WORDS = "read write open close find sort count merge split join".split()


def write(folder: Path, train: int, validation: int = 0, test: int = 0) -> str:
    """Writes so many pairs of each split as the data set `text_pairs` reads them; returns the folder."""
    for start, (split, count) in enumerate((("train", train), ("validation", validation), ("test", test))):
        rows = [
            {"a": f"{WORDS[i % 10]} {WORDS[i * 7 % 9]}", "b": f"do {WORDS[i % 10]} twice", "domain": "abc"[i % 3]}
            for i in range(start, start + count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)
