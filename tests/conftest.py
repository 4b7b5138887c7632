"""Fixtures that several files share. What they need is imported in them: the process that hands out the tests waits for this file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipeline.config import Config


@pytest.fixture(scope="session", autouse=True)
def quick_pages() -> Iterator[None]:
    """Maps are drawn by PCA, as UMAP takes ten seconds to be compiled, and charts for the screen: for paper in one experiment alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.report.material.umap_is_installed", lambda: False)
        patch.setattr("pipeline.report.page.to_png", lambda chart: b"")
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
    from photos import make_photos, small_config

    from pipeline.stages import extract, train_heads

    root = tmp_path_factory.mktemp("experiment")
    config = small_config(make_photos(root / "photos"), root / "output")
    extract.run(config)
    train_heads.run(config)
    return config
