"""manyheads: embed every image once, then train, tune and honestly compare many heads on the cached features."""

from typing import Any

__all__ = ["load", "manifest"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that importing the package costs nothing."""
    if name == "load":
        from pipeline.stages.load import load

        return load
    if name == "manifest":
        from pipeline.data.manifest import manifest

        return manifest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
