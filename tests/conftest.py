"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from photos import make_photos, small_config

from pipeline.config import Config
from pipeline.report import material, page
from pipeline.stages import extract as extract_features
from pipeline.stages import train_heads


@pytest.fixture(scope="session", autouse=True)
def quick_pages() -> Iterator[None]:
    """Maps are drawn by PCA, as UMAP takes ten seconds to be compiled, and charts for the screen: for paper in one experiment alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "umap_is_installed", lambda: False)
        patch.setattr(page, "to_png", lambda chart: b"")
        yield


@pytest.fixture(scope="session", autouse=True)
def one_job() -> Iterator[None]:
    """A search has one job where a test asks for no other number: tests run side by side, and joblib's threads wait in steps of 10 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOKY_MAX_CPU_COUNT", "1")
        yield


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished experiment; tests must not change its files."""
    root = tmp_path_factory.mktemp("experiment")
    config = small_config(make_photos(root / "photos"), root / "output")
    extract_features.run(config)
    train_heads.run(config)
    return config
