"""Turns other people's weights into a model folder that every command here reads.

    python -m launch.convert --source=unireplknet --weights=unireplknet_t_in1k_224_acc83.21.pth --out=DIR

    # hf-mamba2, mamba-ssm, hf-mixtral, hf-qwen3-moe
    python -m launch.convert --source=hf-mamba --weights=FOLDER --out=DIR

A FOLDER of language-model weights holds safetensors (or pytorch_model.bin) and config.json, any sizes; launch.export
writes the same layouts. DIR gets model.safetensors, config.json and report.json (sizes, and the names that did not
match), and tokenizer.json where the source declares end-of-text tokens (eos_token_id), at which launch.generate ends.
The weights may be a `.pth` of PyTorch, which is read without PyTorch and without running what is pickled in it, or a
`.safetensors`.
"""

import json
import os

from absl import flags

from launch import common, outputs
from research import interop
from research.files import printable

_SOURCE = flags.DEFINE_enum(
    "source", None, [*interop.SOURCES, *interop.FOLDERS], "Whose names the weights carry.", required=True
)
_WEIGHTS = common.path_flag(
    "weights", None, "File with the weights, .pth or .safetensors; for language models their folder.", required=True
)
_OUT = outputs.output_flag("out", outputs.Place.FOLDER, "Folder for the result.", reads=[_WEIGHTS], required=True)
_ENTRY = flags.DEFINE_string(
    "entry", None, "Entry of a .pth that holds the state dict, such as model_ema; found by itself if not given."
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 224, "Height and width of the images in pixels, which weights do not tell.", lower_bound=1
)


def main() -> None:
    from research.data import tokenizer_files
    from research.data.tokenizers import IntegerTokenizer
    from research.interop import safetensors_io
    from research.interop.folders import end_of_text
    from research.modules.state import require_finite

    eot: tuple[int, ...] = ()
    if _SOURCE.value in interop.FOLDERS:
        config, params, stats, report = interop.from_folder(_SOURCE.value, _WEIGHTS.value)
        eot = end_of_text(_WEIGHTS.value, config.vocab_size)
    else:
        state = interop.read_weights(_WEIGHTS.value, _ENTRY.value)
        config, params, stats, report = interop.from_source(_SOURCE.value, state, image_size=_IMAGE_SIZE.value)
    require_finite({**params, **stats}, str(_WEIGHTS.value))
    origin = {"source": _SOURCE.value, "weights": os.path.basename(os.path.normpath(_WEIGHTS.value))}
    model = safetensors_io.config_to_json(config)
    name = _registry_name(config) or config.family
    count = sum(p.size for p in params.values())
    full = {
        "name": name,
        **origin,
        "config": model,
        "params": count,
        "stats": sum(s.size for s in stats.values()),
        **report.to_json(),
    }
    texts = {"report.json": json.dumps(full, indent=2) + "\n"}
    if eot:  # the foreign tokenizer is not read: tokens are their numbers, and some end a text
        texts[tokenizer_files.FILE] = tokenizer_files.text_of(IntegerTokenizer(config.vocab_size, eot))
    safetensors_io.save_folder(_OUT.value, config, params, stats, origin, texts)
    form = "" if not config.merges else " in deployed form" if config.deployed() == config else " in training form"
    print(
        f"{name}: {count:,} parameters{form}, {report.matched} arrays matched, {len(report.unexpected)} unused; "
        f"written to {_OUT.value}"
    )
    for unused in report.unexpected[:20]:
        print(f"unused: {printable(unused)}")
    if len(report.unexpected) > 20:
        print(f"unused: {len(report.unexpected) - 20} more, all in {_OUT.value}/report.json")


def _registry_name(config) -> str | None:
    """The registry's name for a model of the same arrays, whatever its classes, images and drop path."""
    from research.models import registry
    from research.modules.state import abstract

    sequence = config.family == "sequence"
    fields = (
        ("vocab_size", "tied", "pattern", "ffn", "dim", "depth")
        if sequence
        else ("depths", "dims", "kernels", "mlp_dims")
    )
    for name in registry.list_models():
        other = registry.entry(name).config
        same = other.family == config.family and all(vars(other).get(f) == vars(config).get(f) for f in fields)
        if same and (not sequence or abstract(other).num_params() == abstract(config).num_params()):
            return name
    return None


if __name__ == "__main__":
    common.run(main)
