"""Cuts a sub-network out of a run: a folder with model.safetensors and config.json that runs by itself.

python -m launch.extract --workdir=runs/quickstart --subnet=s --out=runs/quickstart/s
python -m launch.extract --workdir=runs/quickstart --subnet=width=0.5 --deploy --out=runs/half
"""

from typing import Any

from absl import flags

from launch import common, outputs

_WORKDIR = common.path_flag("workdir", None, "Directory of a run.")
_SUBNET = flags.DEFINE_string("subnet", "full", "A name, or choices such as width=0.5,depth=0.5.")
_OUT = outputs.output_flag("out", outputs.Place.FOLDER, "Folder for the stand-alone network.", reads=[_WORKDIR])
_DEPLOY = flags.DEFINE_bool("deploy", False, "Merge re-parameterised branches and batch norms.")
_CHECK = flags.DEFINE_bool("check", True, "Compare its outputs with the in-place sub-network's on validation images.")


def _validation_batch(trained: Any) -> Any:
    """Images to compare on; None, which is said, where there are none."""
    from research.errors import UserError

    try:
        batch = next(iter(trained.evaluator.batches("validation")), None)
        why = "the run has no validation split"
    except UserError as error:
        batch, why = None, f"the run's data are not there: {error}"
    if batch is None:
        print(f"its outputs are not compared with the in-place sub-network's: {why}")
    return batch


def main() -> int:
    from research.errors import UserError

    if not _WORKDIR.value or not _OUT.value:
        raise UserError("--workdir and --out are needed, e.g. --workdir=runs/quickstart --subnet=s --out=runs/s")

    import numpy as np

    from research.data import tokenizer_files
    from research.interop import safetensors_io
    from research.modules.state import apply
    from research.train.extraction import Trained

    trained = Trained(_WORKDIR.value, say=print)
    name = trained.add(_SUBNET.value)
    config, params, stats = trained.model(name)
    batch = _validation_batch(trained) if _CHECK.value else None
    if batch is not None:
        inside = apply(
            config,
            trained.programs.effective(name, trained.weights.params, trained.weights.methods),
            stats,
            *trained.setup.task.inputs(batch),
        )[0]
    if _DEPLOY.value:
        config, params, stats = config.merge(params, stats)
    origin = {
        "workdir": str(_WORKDIR.value),
        "step": trained.step,
        "subnet": name,
        "preprocess": dict(trained.config.data.augment),
    }
    tokenizer = tokenizer_files.load_tokenizer(_WORKDIR.value, required=False)
    texts = {tokenizer_files.FILE: tokenizer_files.text_of(tokenizer)} if tokenizer else {}
    safetensors_io.save_folder(_OUT.value, config, params, stats, origin, texts)
    size = sum(int(np.prod(p.shape)) for p in params.values())
    form = (
        ""
        if not config.merges or config.deployed() == config
        else " of the training form (--deploy writes the smaller merged one)"
    )
    print(f"{name}: {size:,} parameters{form} written to {_OUT.value}")
    if batch is not None:
        again = safetensors_io.load_folder(_OUT.value)
        outside = apply(again[0], again[1], again[2], *trained.setup.task.inputs(batch))[0]
        gap = float(np.abs(np.asarray(outside) - np.asarray(inside)).max() / np.abs(np.asarray(inside)).max())
        print(f"largest difference of its logits to the in-place sub-network's: {gap:.1e} of the largest logit")
        if not gap < 1e-4:
            raise UserError(
                "the extracted network does not give the in-place one's output; this is a bug, please report it"
            )
    beside = _OUT.value.rstrip("/")  # a file of the model's own folder is not overwritten
    common.print_next(f"python -m launch.export --workdir={_OUT.value} --format=stablehlo --out={beside}.stablehlo")
    trained.programs.close()
    return 0


if __name__ == "__main__":
    common.run(main)
