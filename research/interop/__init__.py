"""Other people's weights in, ours out: PyTorch and safetensors files, official names, StableHLO, ONNX."""

import importlib
from typing import Any

from research.errors import UserError
from research.files import check_regular, printable

SOURCES = {"unireplknet": "research.interop.unireplknet_names"}
"""Name of a source -> module with `from_official(state dict, image_size=...) -> (config, params, stats, report)`."""

FOLDERS = {
    **dict.fromkeys(("hf-mamba", "hf-mamba2", "mamba-ssm"), "research.interop.mamba_names"),
    **dict.fromkeys(("hf-mixtral", "hf-qwen3-moe"), "research.interop.moe_names"),
}
"""Sources whose weights have a config.json beside them -> module with `config_from_foreign`, `from_foreign` and
`to_foreign`."""


def read_weights(path: str, key: str | None = None) -> dict[str, Any]:
    """Returns the arrays of a `.pth` or `.safetensors` file by name; the content decides, not the file's name.

    Args:
      key: entry of a `.pth` checkpoint that holds the state dict (see `research.interop.pth.read_pth`).

    Raises:
      UserError: the file cannot be read as either.
    """
    from research.interop import pth, safetensors_io

    check_regular(path)
    try:
        with open(path, "rb") as f:
            head = f.read(9)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if head[8:9] == b"{":
        return safetensors_io.load_safetensors(path)
    return pth.read_pth(path, key)


def from_folder(source: str, path: str, **options: Any) -> tuple[Any, dict, dict, Any]:
    """Returns (config, params, stats, report) of a folder (or a weights file with its config.json beside it) of one of
    FOLDERS.

    Args:
      options: see `research.interop.folders.load`.

    Raises:
      UserError: the folder cannot be read, or holds another architecture.
    """
    return importlib.import_module("research.interop.folders").load(source, path, **options)


def to_folder(target: str, folder: str, config: Any, params: dict) -> None:
    """Writes a model in the layout of one of FOLDERS.

    Raises:
      UserError: the layout cannot hold such a model.
    """
    importlib.import_module("research.interop.folders").save(target, folder, config, params)


def from_source(source: str, state: dict[str, Any], **kwargs) -> tuple[Any, dict, dict, Any]:
    """Returns (config, params, stats, report) of a state dict under the names of `source`.

    Raises:
      UserError: unknown source, or arrays that do not fit.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {printable(source)!r}; valid: {', '.join(SOURCES)}")
    return importlib.import_module(SOURCES[source]).from_official(state, **kwargs)
