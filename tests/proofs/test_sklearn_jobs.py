"""Each image goes through the network once, whatever folds and processes ask for it: the network writes down what it is given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from photos import make_photos
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from manyheads import Embedder

NETWORK = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 8, 8)

    def forward(self, x):
        if float(x.sum()) == 12345.0:  # so that it cannot be traced, and is run as it is
            return x
        with open("log", "a") as log:
            log.writelines(f"{row.double().abs().sum().item():.6f}\\n" for row in x)
        return self.conv(x).relu().mean((2, 3))

def net():
    return Net(), {"resize": 32, "crop": 32}
"""


def test_two_processes_embed_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("counting.py").write_text(NETWORK, encoding="utf-8")
    photos = make_photos(Path("photos"), per_class=40)
    paths = sorted(map(str, photos.rglob("*.png")))
    kinds = [Path(path).parent.name for path in paths]
    embedder = Embedder("counting:net", store="kept")
    embedder.get_feature_names_out()  # loads it, and shows it its probe images
    probes = set(Path("log").read_text(encoding="utf-8").split())
    model = make_pipeline(embedder, LogisticRegression(max_iter=500))
    cross_val_score(model, paths, kinds, cv=5, n_jobs=2)
    GridSearchCV(model, {"logisticregression__C": [0.1, 1, 10]}, cv=5, n_jobs=2).fit(paths, kinds)
    given = Counter(line for line in Path("log").read_text(encoding="utf-8").split() if line not in probes)
    print(f"{len(paths)} photos, {given.total()} images through the network")
    assert len(given) == len(paths)
    assert set(given.values()) == {1}
