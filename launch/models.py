"""Lists the registry: names, parameters, FLOPs, paper and source.

python -m launch.models
python -m launch.models "unireplknet*" --csv=models.csv
"""

import sys

from launch import common, outputs

_CSV = outputs.output_flag("csv", outputs.Place.FILE, "CSV file to write beside the table.")


def main(pattern: str) -> int:
    from research.errors import UserError
    from research.models import registry
    from research.report import tables
    from research.report.machine import command_line
    from research.train import costs

    names = registry.list_models(pattern)
    if not names:
        raise UserError(f"no model matches {pattern!r}; known: {', '.join(registry.list_models())}")
    rows = []
    for name in names:
        info = registry.model_info(name)
        config = registry.entry(name).config
        inference = costs.static_costs(config)
        rows.append(
            {
                "name": name,
                "family": info["family"],
                "params": info["params"],
                "inference_params": inference["params"],
                "flops": inference["flops"],
                "active_params": info["active_params"],
                "input": "x".join(map(str, info["input"])),
                "elastic": " ".join(info["elastic"]),
                "paper": info["paper"],
                "source": info["source"],
            }
        )
    print(tables.text_table(rows, ["name", "params", "active_params", "inference_params", "flops", "input", "paper"]))
    if _CSV.value:
        tables.write_csv(_CSV.value, rows, command=command_line())
        print(f"written to {_CSV.value}")
    return 0


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if not a.startswith("-")]
    for word in words[:1]:
        sys.argv.remove(word)
    common.run(lambda: main(words[0] if words else "*"))
