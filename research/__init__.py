"""Nestax: efficient architectures in JAX, every one trainable many-in-one.

`create_model`, `list_models` and `model_info` come from `research.models.registry`; importing this package is cheap.
"""

__all__ = ["create_model", "list_models", "model_info"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in __all__:
        from research.models import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'research' has no attribute {name!r}")
