"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from photos import make_photos, small_config

from pipeline.config import Config
from pipeline.report import material
from pipeline.stages import extract as extract_features
from pipeline.stages import train_heads


@pytest.fixture(scope="session", autouse=True)
def no_umap() -> Iterator[None]:
    """Maps are drawn by PCA, also where UMAP is installed: it takes ten seconds to be compiled, in every process anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "umap_is_installed", lambda: False)
        yield


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished experiment; tests must not change its files."""
    root = tmp_path_factory.mktemp("experiment")
    config = small_config(make_photos(root / "photos"), root / "output")
    extract_features.run(config)
    train_heads.run(config)
    return config
