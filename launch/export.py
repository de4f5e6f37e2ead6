"""Writes a trained or converted model for use elsewhere.

    python -m launch.export --workdir=DIR --format=safetensors --out=DIR2 [--subnet=NAME] [--deploy]
    python -m launch.export --workdir=DIR --format=stablehlo   --out=model.stablehlo
    python -m launch.export --workdir=DIR --format=onnx        --out=model.onnx
    # hf-mamba2, mamba-ssm, hf-mixtral, hf-qwen3-moe
    python -m launch.export --workdir=DIR --format=hf-mamba    --out=DIR2

DIR is a run directory, or a folder written by launch.convert or launch.extract. stablehlo is a program serialised by
jax.export for cpu, cuda and tpu, weights inside: `jax.export.deserialize(open(FILE, "rb").read()).call(images)`. What
it is called with, images, tokens, or tokens with their domains and mask, stands in FILE.json: names, shapes, dtypes.
onnx needs jax2onnx; the error without it names the command that installs it.
"""

import os

from absl import flags

from launch import common, outputs
from research import interop
from research.files import replace_file

_FORMATS = ("safetensors", "stablehlo", "onnx", *interop.FOLDERS)
_WORKDIR = common.path_flag(
    "workdir", None, "Run directory, or folder with model.safetensors and config.json.", required=True
)
_FORMAT = flags.DEFINE_enum("format", None, _FORMATS, "What to write: a folder (safetensors) or a file.", required=True)
_OUT = outputs.output_flag(
    "out", outputs.Place.EITHER, "File to write; a folder for safetensors.", reads=[_WORKDIR], required=True
)
_SUBNET = flags.DEFINE_string(
    "subnet", "full", "Which sub-network: a name of the run, or choices such as width=0.5,depth=0.5."
)
_DEPLOY = flags.DEFINE_bool("deploy", False, "Merge re-parameterised branches and norms first (UniRepLKNet).")
_BATCH = flags.DEFINE_integer(
    "batch", None, "Fixed number of examples for stablehlo and onnx; left open if not given.", lower_bound=1
)


def main() -> None:
    from research.errors import UserError
    from research.interop import safetensors_io
    from research.train import extraction

    config, params, stats = extraction.load_model(_WORKDIR.value, _SUBNET.value, say=print)
    if _DEPLOY.value:
        if not config.merges:
            raise UserError(
                f"--deploy merges models that train in another form; {_WORKDIR.value} holds a {config.family}, "
                "which does not"
            )
        config, params, stats = config.merge(params, stats)
    out, count = _OUT.value, sum(p.size for p in params.values())
    if _FORMAT.value == "safetensors":
        safetensors_io.save_folder(
            out,
            config,
            params,
            stats,
            {"source": os.path.basename(os.path.abspath(_WORKDIR.value)), "subnet": _SUBNET.value},
        )
    elif _FORMAT.value in interop.FOLDERS:
        interop.to_folder(_FORMAT.value, out, config, params)
    else:
        _write_program(out, config, params, stats)
    print(f"{config.family}: {count:,} parameters written to {out} as {_FORMAT.value}")


def _write_program(out: str, config, params, stats) -> None:
    """Writes FILE, then FILE.json beside it, each whole; the SHA-256 in the second tells that they belong together."""
    import hashlib

    from research.files import is_run, write_json
    from research.interop.program_inputs import describe, signature

    data = _program(_FORMAT.value)(config, params, stats, batch=_BATCH.value)
    told = describe(config, _BATCH.value, _preprocessing(config) if is_run(_WORKDIR.value) else None)
    replace_file(out, lambda temp: _write(temp, data))
    write_json(f"{out}.json", {**told, "format": _FORMAT.value, "sha256": hashlib.sha256(data).hexdigest()})
    print(f"{signature(told)}; told in {out}.json")


def _preprocessing(config) -> dict | None:
    """What the run did to images before the network saw them in evaluation; None where it sees none."""
    import dataclasses

    from research.data.augment import make_augment
    from research.interop.program_inputs import inputs_of
    from research.train.rundir import read_config

    augment = dataclasses.asdict(make_augment(read_config(_WORKDIR.value)["data"]["augment"]))
    if inputs_of(config)[0].name != "images" and not augment["sequence"]:
        return None
    kept = {name: augment[name] for name in ("pad_to", "resized_crop", "mean", "std", "sequence") if augment[name]}
    return {"normalisation": "(x - mean) / std, x the pixels in 0..1", **kept}


def _program(kind: str):
    if kind == "onnx":
        from research.interop.onnx import export_onnx

        return export_onnx
    from research.interop.stablehlo import export_stablehlo

    return export_stablehlo


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)


if __name__ == "__main__":
    common.run(main)
