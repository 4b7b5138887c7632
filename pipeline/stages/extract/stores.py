"""Where the store of an embedding is, and opening it where there is one."""

from __future__ import annotations

from pathlib import Path

from pipeline.embed.spec import EmbeddingSpec
from pipeline.experiment import Artifacts
from pipeline.store import FeatureStore


def place(spec: EmbeddingSpec, files: Artifacts) -> Path:
    """The embedding's store, also where it was made under another name: weights in a file that was renamed since."""
    path = files.store(spec.name, spec.fingerprint())
    if not path.exists():
        suffix = path.name.removeprefix(spec.name)
        return next(iter(sorted(files.stores.glob(f"*{suffix}"))), path)
    return path


def open_store(path: Path, spec: EmbeddingSpec) -> FeatureStore | None:
    """Open an embedding's store; None when it was never published.

    Raises
    ------
    StoreError
        When it is damaged.
    """
    if not any(path.glob("snapshot-*.h5")):
        return None
    return FeatureStore.open(path, spec.fingerprint())
