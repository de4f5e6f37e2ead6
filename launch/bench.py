"""Times ops and models beside their reference implementations, XLA's own ops and other frameworks, in one process and
in turns.

    python -m launch.bench --list
    python -m launch.bench --op=depthwise_conv2d --shapes=13x13 --peer=torch --csv=FILE.csv --plot=FILE.png
    python -m launch.bench --model=unireplknet_a --peer=unireplknet:PATH/unireplknet.py
    python -m launch.bench --op=my_op --plugin=my_op_cases.py      # cases of one's own
    python -m launch.bench --suite=grouped                        # judged: exit code 1 when a threshold is missed
    python -m launch.bench --tune=depthwise_conv2d                # measures research/ops/implementations.csv anew
    python -m launch.bench --config=configs/quickstart.py         # what the loop adds to the bare jitted step

Each case prints its floor, the larger of FLOPs / rate of a matrix product and bytes / bandwidth, both measured in this
run.
"""

import tempfile
from pathlib import Path

from absl import flags

from launch import common, outputs
from research.errors import UserError
from research.files import write_text
from research.process import set_allocator

_OP = flags.DEFINE_string("op", None, "Op to time.")
_MODEL = flags.DEFINE_string("model", None, "Model to time.")
_SUITE = flags.DEFINE_string("suite", None, "Cases to time and judge by their thresholds.")
_TUNE = flags.DEFINE_string("tune", None, "Op whose rows in the table of implementations are measured and written.")
_LIST = flags.DEFINE_bool(
    "list", False, "Print ops, models, suites, tunable ops and peers, and which peers are installed."
)
_SHAPES = flags.DEFINE_string("shapes", "", "Only cases whose name, shape and direction hold this text.")
_IMPLEMENTATIONS = flags.DEFINE_bool("implementations", False, "Time every implementation of the op by name as well.")
_PEER = flags.DEFINE_list("peer", [], "Peers to time beside ours: NAME or NAME:PATH, separated by commas.")
_PLOT = outputs.output_flag("plot", outputs.Place.FILE, "PNG file to write: times by contender, with the floors.")
_CONFIG = common.path_flag("config", None, "Recipe whose training loop is measured against its bare step.")
_STEPS = flags.DEFINE_integer("steps", 100, "With --config: updates of each kind to time.", lower_bound=3)
_CSV = outputs.output_flag(
    "csv", outputs.Place.FILE, "CSV file to write beside the table, and a page of Markdown with the same name."
)

COLUMNS = {
    "contender": "contender", "median_ms": "median", "p5_ms": "p5", "p95_ms": "p95", "repeats": "calls",
    "compile_s": "compile", "temp_bytes": "temporary", "of_floor": "/ floor", "of_ours": "/ ours",
}  # fmt: skip


THRESHOLD_COLUMNS = ["claim", "figure", "asked", "met"]


class _Quiet:
    def say(self, line: str) -> None:
        print(line)

    def progress(self, done: int, total: int, text: str) -> None:
        pass


def main(overrides: dict[str, str]) -> int:
    modes = {"op": _OP, "model": _MODEL, "suite": _SUITE, "tune": _TUNE, "list": _LIST, "config": _CONFIG}
    chosen = [name for name, flag in modes.items() if flag.value]
    if len(chosen) != 1:
        what = "nothing to do" if not chosen else f"--{' and --'.join(chosen)} exclude each other"
        raise UserError(f"{what}: give one of --op, --model, --suite, --tune, --config or --list")
    if _LIST.value:
        return _print_list()
    if _CONFIG.value:
        return _loop_overhead(overrides)
    return _tune(_TUNE.value) if _TUNE.value else _measure()


def _print_list() -> int:
    from research.bench import catalog, tune
    from research.report import tables

    rows = [{"kind": "op", "name": name, "what": entry.about} for name, entry in catalog.known("op").items()]
    rows += [{"kind": "model", "name": name, "what": entry.about} for name, entry in catalog.known("model").items()]
    for name, suite in catalog.suites().items():
        rows += [
            {"kind": "suite", "name": name, "what": f"{threshold.claim}: {threshold.bound}"}
            for threshold in suite.thresholds
        ]
    rows += [{"kind": "tune", "name": name, "what": "implementation by shape on a CPU"} for name in tune.known()]
    for name, (needs, _) in catalog.PEERS.items():
        rows.append(
            {
                "kind": "peer",
                "name": name,
                "what": f"{'installed' if catalog.installed(name) else 'not installed'}: {needs}",
            }
        )
    print(tables.text_table(rows, {"kind": "kind", "name": "name", "what": "what"}), end="")
    return 0


def _measure() -> int:
    from research.bench import catalog, thresholds

    suite = catalog.find_suite(_SUITE.value) if _SUITE.value else None
    peers = catalog.parse_peers(_PEER.value)
    if suite and thresholds.needs_peer(suite) and not {threshold.peer for threshold in suite.thresholds} & peers.keys():
        needed = ", ".join(sorted({threshold.peer for threshold in suite.thresholds}))
        raise UserError(
            f"suite {_SUITE.value} judges against a peer: "
            f"give --peer={needed} ({catalog.PEERS[needed.split(',')[0]][0]})"
        )
    allocator = _allocator(bool(peers))  # before JAX starts threads

    from research.bench import run
    from research.report import plots, tables

    cases = _cases(suite, peers)
    rates = run.rates()
    header = {**run.header(rates, list(peers)), "allocator": allocator}
    print("".join(f"{key}: {value}\n" for key, value in header.items()))
    rows = []
    for i, case in enumerate(cases, 1):
        rows += (new := run.measure(case, rates, implementations=_IMPLEMENTATIONS.value, peers=list(peers)))
        floor = tables.human_ms(new[0]["floor_ms"])
        print(f"[{i}/{len(cases)}] {case.key} | {tables.human_count(case.flops, 'FLOPs')} | floor {floor}")
        print(tables.text_table(new, COLUMNS), flush=True)
    judged = [threshold.judge(rows, peers) for threshold in suite.thresholds] if suite else []
    if judged:
        print(tables.text_table(judged, THRESHOLD_COLUMNS), end="")
    if _CSV.value:
        _write(Path(_CSV.value), rows, judged, header)
    if _PLOT.value:
        labelled = [{**row, "case": f"{row['name']} {row['shape']}\n{row['direction']}"} for row in rows]
        plots.bars_plot(_PLOT.value, labelled, "case", "contender", "median_ms", "floor_ms", title=header["device"])
    return 1 if any(row["met"] == "no" for row in judged) else 0


def _allocator(with_peers: bool) -> str:
    """Sets the allocator, for all contenders alike; returns how it is set.

    PyTorch becomes several times slower in the one heap that XLA's compiler has left in pieces, and ours becomes slower
    with a heap a thread: beside a peer there are two.
    """
    if not set_allocator(arenas=2 if with_peers else 1):
        return "the C library's own settings"
    return f"glibc, {'two heaps' if with_peers else 'one heap'}, never trimmed, nothing mapped apart"


def _cases(suite, peers: dict[str, str]) -> list:
    from research.bench import catalog

    if suite:
        cases = catalog.cases_of(suite, peers)
    else:
        entry = catalog.find("op", _OP.value) if _OP.value else catalog.find("model", _MODEL.value or "")
        cases = entry.cases(peers)
    found = [case for case in cases if _SHAPES.value in case.key]
    if not found:
        raise UserError(f"no case holds --shapes={_SHAPES.value!r}; valid: {'; '.join(case.key for case in cases)}")
    return found


def _write(path: Path, rows: list[dict], judged: list[dict], header: dict[str, str]) -> None:
    """The figures and the judged thresholds as CSV, and both as a page of Markdown beside them."""
    from research.report import machine, tables

    command = machine.command_line()
    tables.write_csv(path, rows, command=command, header=header)
    if judged:
        tables.write_csv(path.with_name(f"{path.stem}_thresholds{path.suffix}"), judged, command=command, header=header)
    parts = [f"Made by `{command}`:\n", "".join(f"* {key}: {value or 'none'}\n" for key, value in header.items())]
    if judged:
        parts.append(tables.markdown_table(judged, THRESHOLD_COLUMNS))
    parts.append(tables.markdown_table(rows, {"name": "case", "shape": "shape", "direction": "direction", **COLUMNS}))
    write_text(path.with_suffix(".md"), "\n".join(parts))


def _tune(op: str) -> int:
    from research.bench import tune
    from research.ops import dispatch
    from research.report import machine

    if op not in (tuners := tune.known()):
        raise UserError(f"no tuner for {op!r}; valid: {', '.join(tuners)}")
    rows = []
    for at, directions in tuners[op]():
        for row in tune.rows_of(op, at, directions):
            rows.append(row)
            print(f"{row['direction']:12} {row['at']:40} {row['ms']}", flush=True)
    tune.write(dispatch.TABLE, op, rows, machine.command_line())
    print(f"{len(rows)} rows written to {dispatch.TABLE}")
    return 0


def _loop_overhead(overrides: dict[str, str]) -> int:
    """An update of the loop takes the batch from the pipeline, places it, runs the gradient programs and the update
    program, and reads the metrics of the update before. The bare step runs the same programs on a batch that is already
    in place."""
    from launch import config as recipe
    from research.report import tables
    from research.report.machine import command_line
    from research.train.overhead import loop_overhead
    from research.train.setup import make_setup

    setup = make_setup(recipe.load(_CONFIG.value, overrides))
    every = setup.steps(setup.config.checkpoint.every, "checkpoint.every")
    config = recipe.load(
        _CONFIG.value, {**overrides, "train.duration": str(2 * _STEPS.value + 200), "optim.warmup": "0"}
    )
    with tempfile.TemporaryDirectory() as workdir:
        rows, added = loop_overhead(config, _STEPS.value, workdir, _Quiet())
    print(tables.text_table(rows, ["what", "median_ms", "p95_ms"]))
    print(f"the loop adds {100 * added:.1f} % at the median of {_STEPS.value} neighbouring pairs")
    blocked = rows[2]["median_ms"] / rows[1]["median_ms"]
    rhythm = (
        f"one every {every} updates, as the recipe asks, adds {100 * blocked / every:.2f} %"
        if every
        else "the recipe saves at its end only"
    )
    print(f"a save blocks it for {blocked:.2f} updates; {rhythm}")
    if _CSV.value:
        tables.write_csv(_CSV.value, [{**row, "added_percent": 100 * added} for row in rows], command=command_line())
    return 0


if __name__ == "__main__":
    from launch.config import from_argv

    common.run(lambda: main(common.OVERRIDES), before=from_argv)
