"""Several columns of labels: embedded and split once, and a leaderboard for each that knows nothing of the others."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from photos import make_photos

import pipeline
from pipeline import config as configuration
from pipeline.cli import cli
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.embed import loader
from pipeline.errors import PipelineError
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.images import open_file
from pipeline.stages import extract, predict, targets

SPECIES, PLACE = "species", "place/../x"
"""The name of a column may hold what no folder may be called."""


def make_config(root: Path, **dataset: object) -> Config:
    photos = make_photos(root / "photos")
    lines = [f"file,{SPECIES},{PLACE}"]
    for path in sorted(photos.glob("*/*.png")):
        label, number = path.parent.name, int(path.stem)
        place = "" if number % 4 == 3 else ["sea", "land"][label == "leaf"]
        lines.append(f'"{path}","{label}",{place}')
    (root / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    manifest = {
        "source": "manifest", "path": str(root / "list.csv"), "root": str(photos), "path_column": "file",
        "label_columns": [SPECIES, PLACE], **dataset,
    }  # fmt: skip
    raw = {
        "output": str(root / "output"), "dataset": manifest,
        "backbones": [{"name": "resnet18", "preprocessing": {"resize": 32, "crop": 32}}],
        "baselines": ["majority", "pixels"], "heads": ["nearest_centroid"], "tuning": {"trials": 2, "folds": 3},
    }  # fmt: skip
    return configuration.parse(raw, "test")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """A finished experiment with what `heads` printed; tests must not change its files."""
    config = make_config(tmp_path_factory.mktemp("several"))
    extract.run(config)
    found = CliRunner().invoke(cli, ["heads", str(Artifacts(config.output).config)])
    assert found.exit_code == 0, found.output
    return config, found.output


def test_each_target_is_an_experiment_on_the_same_split_and_store(several: tuple[Config, str]) -> None:
    files = Artifacts(several[0].output)
    whole, each = DatasetIndex.read(files.dataset), files.each_target()
    assert list(each) == [SPECIES, PLACE]
    assert sorted(path.name for path in files.root.joinpath("targets").iterdir()) == ["place%2F%2E%2E%2Fx", "species"]
    assert not files.leaderboard.exists()
    for name, images in ((SPECIES, 36), (PLACE, 27)):
        index = DatasetIndex.read(Artifacts(each[name]).dataset)
        assert (len(index), index.names) == (images, ("label",))
        assert index.splits.tolist() == whole.rows(whole.column(name) != "").splits.tolist()
        board = read_leaderboard(each[name])
        assert {row.key for row in board.rows} >= {
            "resnet18-random-penultimate/nearest_centroid",
            "majority/most_frequent",
        }
        assert pipeline.load(each[name], embedding="pixels").X.shape == (images, 768)
    stores = {json.loads(Artifacts(root).features.read_text())["embeddings"][0]["digest"] for root in each.values()}
    assert len(stores) == 1


def test_the_end_is_a_table_over_the_targets(several: tuple[Config, str]) -> None:
    config, printed = several
    files = Artifacts(config.output)
    assert printed.index("== species ==") < printed.index(f"== {PLACE} ==") < printed.index("== all targets ==")
    table = [line.split("  ") for line in printed.partition("== all targets ==")[2].splitlines()]
    (row,) = (line for line in table if line[0] == PLACE)
    cells = [cell.strip() for cell in row if cell.strip()]
    best = read_leaderboard(files.target(PLACE)).best
    assert best.test is not None
    assert cells[:3] == [PLACE, str(len(DatasetIndex.read(files.target(PLACE) / "dataset").select("train"))), best.key]
    assert cells[4].startswith(f"{100 * best.test.accuracy:.1f} [")
    page = (files.root / "report.html").read_text(encoding="utf-8")
    assert '<a href="targets/place%252F%252E%252E%252Fx/report.html">place/../x</a>' in page
    assert best.key in page


def test_a_target_goes_on_as_an_experiment_of_its_own(several: tuple[Config, str]) -> None:
    files = Artifacts(several[0].output)
    alone = configuration.load(files.target(SPECIES) / "config.yaml")
    assert alone.dataset == targets.experiments(several[0])[SPECIES].dataset
    run = extract.run(alone)
    assert run.scan.unchanged
    assert run.pending == 0
    printed = CliRunner().invoke(cli, ["heads", str(files.target(SPECIES) / "config.yaml")]).output
    assert "3 of 3 rows were finished before and kept." in printed
    assert "==" not in printed


def test_one_predict_fills_all_columns_and_reads_each_image_once(
    several: tuple[Config, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        loader, "open_file", lambda root, path, digest: read.append(path) or open_file(root, path, digest)
    )
    photos, output = make_photos(tmp_path / "new", per_class=2, seed=1), Path(several[0].output)
    (photos / "leaf" / "broken.png").write_bytes(b"no image")
    result = predict.run(output, [photos], output=tmp_path / "all.csv", top=2)
    assert sorted(read) == sorted(map(str, photos.glob("*/*.png")))
    with (tmp_path / "all.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == [
        "path", "status", SPECIES, f"{SPECIES}_probability", f"{SPECIES}_label_2", f"{SPECIES}_probability_2",
        PLACE, f"{PLACE}_probability", f"{PLACE}_label_2", f"{PLACE}_probability_2",
    ]  # fmt: skip
    for start, name in ((2, SPECIES), (6, PLACE)):
        alone = predict.run(Artifacts(output).target(name), [photos], output=tmp_path / "one.csv", top=2)
        with (tmp_path / "one.csv").open(encoding="utf-8", newline="") as file:
            assert [row[:2] + row[start : start + 4] for row in rows] == list(csv.reader(file))[1:]
        assert result.labels[name] == alone.labels[""]
    assert result.unreadable == 1
    assert [row[2:] for row in rows if row[1] != "ok"] == [[""] * 8]


def test_one_column_leaves_no_list_of_targets(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    extract.run(config)
    files = Artifacts(config.output)
    assert files.targets.exists()
    extract.run(make_config(tmp_path, label_columns=[SPECIES]))
    assert files.each_target() == {}


def test_kinds_are_of_columns_that_there_are(tmp_path: Path) -> None:
    config = make_config(tmp_path, target={PLACE: "classification"})
    assert [alone.dataset.target for alone in targets.experiments(config).values()] == ["auto", "classification"]
    with pytest.raises(PipelineError, match=r"dataset: target: unknown column 'specie', did you mean 'species'\?"):
        make_config(tmp_path, target={"specie": "classification"})
