"""Judges a sentence encoder on the pairs of its test split, beside TF-IDF of the same words: F1, ROC-AUC, retrieval, by
domain.

    python -m launch.embed --workdir=runs/domain_encoder/arg=domain_seed=0 --out=results/domain_encoder/domain_0.csv
    python -m launch.embed --workdir=runs/domain_encoder/arg=domain_seed=0 --query="open a socket and listen" \\
        --domain=internet

F1 takes a threshold from the validation split; pairs that do not belong together are of one domain. `next domain`: the
model when every text is sent to the wrong experts. With --query, the test passages nearest to a text, in vectors of
--domain's experts.
"""

from absl import flags

from launch import common, outputs

_WORKDIR = common.path_flag("workdir", None, "Directory of a run over pairs of texts.")
_SUBNET = flags.DEFINE_string("subnet", "full", "A name, or choices such as width=0.5.")
_PAIRS = flags.DEFINE_integer("pairs", 2000, "Pairs of each split, at most.", lower_bound=2)
_OUT = outputs.output_flag("out", outputs.Place.FILE, "CSV file to write beside the table.", reads=[_WORKDIR])
_QUERY = flags.DEFINE_string("query", None, "A text to find passages for.")
_DOMAIN = flags.DEFINE_string("domain", None, "Name or number of the query's domain.")


def main() -> int:
    from research.errors import UserError

    if not _WORKDIR.value:
        raise UserError(
            "--workdir is needed: the directory of a run, e.g. --workdir=runs/domain_encoder/arg=domain_seed=0"
        )

    from research.report import tables
    from research.report.machine import command_line
    from research.search import embedding
    from research.tasks.contrastive import Contrastive
    from research.train.extraction import Trained

    trained = Trained(_WORKDIR.value, say=print)
    task, splits = trained.setup.task, trained.setup.splits
    if not isinstance(task, Contrastive):
        raise UserError(
            f"{_WORKDIR.value} is no run over pairs of texts; this command is for data sets such as stdlib_pairs"
        )
    model = trained.model(trained.add(_SUBNET.value))
    trained.programs.close()
    if _QUERY.value is not None:
        for score, text in embedding.nearest(model, splits["test"], _QUERY.value, _DOMAIN.value, task=task):
            print(f"{score:.3f}  {' '.join(text.split())[:110]}")
        return 0
    rows = embedding.compare(model, splits, task, pairs=_PAIRS.value)
    print(f"test split, step {trained.step} of {_WORKDIR.value}")
    print(tables.text_table(rows, list(rows[0])))
    if _OUT.value:
        tables.write_csv(_OUT.value, rows, command=command_line())
        print(f"written to {_OUT.value}")
    return 0


if __name__ == "__main__":
    common.run(main)
