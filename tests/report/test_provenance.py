"""The sentence of a result's page."""

from research.report import provenance


def test_a_page_says_how_its_numbers_were_made():
    reports = [
        {"updates": 1200, "train_flops": 3.746e11, "wall_s": w, "metric": "test accuracy"} for w in (98.2, 105.7)
    ]
    config = {"data": {"batch_size": 64}, "report": {"chosen": ""}}
    assert provenance.line(reports, [config, config]) == (
        "2 seeds; 1,200 updates of 64 examples, 3.75e+11 training FLOPs and 98 to 106 s with compiling a run; "
        "test accuracy; "
        f"chosen: {provenance.UNKNOWN}"
    )
    chosen = "learning rate in five trials, by validation accuracy"
    one = provenance.line(reports[:1], [{"data": {"batch_size": 64}, "report": {"chosen": chosen}}])
    assert one.startswith("1 seed; ") and one.endswith(f"98 s with compiling a run; test accuracy; chosen: {chosen}")
