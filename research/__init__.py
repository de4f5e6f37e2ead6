"""Nestax: efficient architectures in JAX, whose sub-networks are trained together and cut out.

`list_models` and `model_info` come from `research.models.registry`, `create_model` from `research.nested.model`;
importing this package is cheap.
"""

import importlib

_HOMES = {
    "create_model": "research.nested.model",
    "list_models": "research.models.registry",
    "model_info": "research.models.registry",
}
__all__ = ["create_model", "list_models", "model_info"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'research' has no attribute {name!r}")
