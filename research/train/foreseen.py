"""What would fail at the end of a run and is known at its start."""

from research.errors import UserError
from research.train.setup import Setup


def report_split(setup: Setup) -> str:
    """Returns the split that the report's numbers are of: test where it is there and wanted, else validation, ""
    without either."""
    there = [
        split
        for split in ("test", "validation")
        if setup.examples(split) and (split != "test" or setup.config.report.test)
    ]
    return there[0] if there else ""


def check(setup: Setup) -> None:
    """Raises UserError for what only the end of the run would need: an evaluation to stop at, or what task and methods
    ask for."""
    config, data = setup.config, setup.config.data.name
    if config.eval.stop_at is not None and not setup.examples("validation"):
        raise UserError(
            f"eval.stop_at={config.eval.stop_at} needs a validation split, which {data} does not have; remove it"
        )
    for method in setup.methods.items:
        if method.evaluations() and not report_split(setup):
            raise UserError(
                f"method {method.name} needs a test or validation split, which {data} does not have; remove it"
            )
    setup.task.check_report(config.report, data, setup.data.tokenizer)
