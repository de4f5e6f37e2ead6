"""What is on the axes of a plot, read back from the figure before it is saved, and the files."""

import numpy as np
import pytest
from PIL import Image

from research.report import plots

ROWS = [
    {"name": "s", "flops": 1e6, "value": 0.90},
    {"name": "m", "flops": 4e6, "value": 0.95},
    {"name": "worse", "flops": 9e6, "value": 0.93},
    {"name": "l", "flops": 2e7, "value": 0.97},
    {"name": "unknown", "flops": None, "value": 0.99},
]


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved."""
    saved, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_pareto_plot_draws_points_front_names_and_full_line(tmp_path, figures):
    path = plots.pareto_plot(tmp_path / "a" / "p.png", {"run": ROWS}, title="t", full="l")
    (axes,) = figures[0].axes
    np.testing.assert_array_equal(axes.collections[0].get_offsets()[:, 0], [1e6, 4e6, 9e6, 2e7])
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1e6, 0.90], [4e6, 0.95], [2e7, 0.97]])
    assert axes.lines[1].get_linestyle() == "--" and set(axes.lines[1].get_ydata()) == {0.97}
    assert texts(axes) == ["full network: 0.97", "s", "m", "worse", "l"]
    assert axes.get_xscale() == "log" and axes.get_legend() is None
    image = np.asarray(Image.open(path))
    assert image.shape[:2] == (720, 1152)
    assert [p.name for p in path.parent.iterdir()] == ["p.png"]


def test_log_axis_only_where_costs_spread(tmp_path, figures):
    plots.pareto_plot(tmp_path / "p.png", {"run": ROWS[1:3]})
    assert figures[0].axes[0].get_xscale() == "linear"


def test_lower_is_better_turns_the_front(tmp_path, figures):
    plots.pareto_plot(tmp_path / "p.png", {"run": ROWS}, higher_is_better=False)
    np.testing.assert_array_equal(figures[0].axes[0].lines[0].get_xydata(), [[1e6, 0.90]])


def test_series_share_names_and_get_a_legend(tmp_path, figures):
    alone = [{**row, "value": row["value"] + 0.005} for row in ROWS]
    plots.pareto_plot(tmp_path / "p.png", {"many-in-one": ROWS, "trained alone": alone})
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["many-in-one", "trained alone"]
    assert texts(axes) == ["s", "m", "worse", "l"]


def test_names_do_not_overlap_each_other(tmp_path, figures):
    crowd = [{"name": f"width{i}", "flops": 1e6 + 4e3 * i, "value": 0.9 + 0.002 * (i % 3)} for i in range(11)]
    plots.pareto_plot(tmp_path / "p.png", {"run": [*crowd, {"name": "far", "flops": 2e6, "value": 0.5}]})
    (axes,) = figures[0].axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert 3 <= len(boxes) < 12  # a name that finds no place is left out
    assert "far" in texts(axes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_many_points_name_only_the_front(tmp_path, figures):
    rows = [{"name": f"n{i}", "flops": 1e6 + 1e5 * i, "value": 0.9 - 0.01 * i} for i in range(20)]
    plots.pareto_plot(tmp_path / "p.png", {"run": rows})
    assert texts(figures[0].axes[0]) == ["n0"]


def test_nothing_to_draw_still_draws(tmp_path):
    assert plots.pareto_plot(tmp_path / "p.png", {"run": []}).stat().st_size > 1000


@pytest.mark.parametrize(
    "key, cost, tick", [("flops", 2e6, "2 M"), ("latency_ms", 0.5, "500 us"), ("peak_memory_bytes", 3 * 2**20, "3 MiB")]
)
def test_ticks(key, cost, tick):
    assert plots._tick(key, cost) == tick


def test_curves_skip_rows_without_the_metric(tmp_path, figures):
    rows = [
        {"step": 0, "loss": 2.0},
        {"step": 1, "accuracy": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": float("nan")},
    ]
    plots.curves_plot(tmp_path / "c.png", {"a": rows, "b": rows[:1]})
    lines = figures[0].axes[0].lines
    np.testing.assert_array_equal(lines[0].get_xydata(), [[0, 2.0], [2, 1.0]])
    assert len(lines) == 2


def test_long_curves_get_a_running_median(tmp_path, figures):
    rows = [{"step": i, "loss": 100.0 if i == 500 else 1.0} for i in range(1000)]
    plots.curves_plot(tmp_path / "c.png", {"a": rows})
    raw, smooth = figures[0].axes[0].lines
    assert max(raw.get_ydata()) == 100 and max(smooth.get_ydata()) == 1
