"""Fixtures that several files share."""

from __future__ import annotations

import pytest
from photos import make_photos, small_config

from pipeline.config import Config
from pipeline.stages import extract as extract_features
from pipeline.stages import train_heads


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished experiment; tests must not change its files."""
    root = tmp_path_factory.mktemp("experiment")
    config = small_config(make_photos(root / "photos"), root / "output")
    extract_features.run(config)
    train_heads.run(config)
    return config
