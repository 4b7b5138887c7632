"""Several columns of labels: embedded and split once, and a leaderboard for each that knows nothing of the others."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from click.testing import CliRunner
from photos import make_photos

import pipeline
from pipeline import config as configuration
from pipeline.cli import cli
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.data.scan import scan
from pipeline.embed import loader
from pipeline.errors import BundleError, ConfigError, PipelineError, StoreError
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.images import open_file
from pipeline.stages import extract, maintenance, predict, shortlist, targets
from pipeline.stages.estimators import Classifier

SPECIES, SIZE = "species", "size/../x"
"""The name of a column may hold what no folder may be called."""

SIZES = {"leaf": 0.5, "土": 3.0, "sky, blue": 7.0}


def make_config(root: Path, **dataset: object) -> Config:
    photos = make_photos(root / "photos")
    lines = [f"file,{SPECIES},{SIZE}"]
    for path in sorted(photos.glob("*/*.png")):
        label, number = path.parent.name, int(path.stem)
        size = "" if number % 4 == 3 else f"{SIZES[label] + number / 100:.2f}"
        lines.append(f'"{path}","{label}",{size}')
    (root / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    manifest = {
        "source": "manifest", "path": str(root / "list.csv"), "root": str(photos), "path_column": "file",
        "label_columns": [SPECIES, SIZE], "target": {SIZE: "regression"}, **dataset,
    }  # fmt: skip
    raw = {
        "output": str(root / "output"), "dataset": manifest,
        "backbones": [{"name": "squeezenet1_1", "preprocessing": {"resize": 32, "crop": 32}}],
        "baselines": ["majority", "pixels"], "heads": ["nearest_centroid", "ridge"], "tuning": {"trials": 1, "folds": 3},
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
    assert list(each) == [SPECIES, SIZE]
    assert sorted(path.name for path in files.root.joinpath("targets").iterdir()) == ["size%2F%2E%2E%2Fx", "species"]
    assert not files.leaderboard.exists()
    for name, images, own in ((SPECIES, 36, "nearest_centroid"), (SIZE, 27, "ridge")):
        index = DatasetIndex.read(Artifacts(each[name]).dataset)
        assert (len(index), index.names) == (images, ("label",))
        assert index.splits.tolist() == whole.rows(whole.column(name) != "").splits.tolist()
        board = read_leaderboard(each[name])
        assert f"squeezenet1_1-random-penultimate/{own}" in {row.key for row in board.rows}
        assert board.scoring == ("mae" if name == SIZE else "accuracy")
        assert pipeline.load(each[name], embedding="pixels").X.shape == (images, 768)
    stores = {json.loads(Artifacts(root).features.read_text())["embeddings"][0]["digest"] for root in each.values()}
    assert len(stores) == 1


def test_the_end_is_a_table_over_the_targets(several: tuple[Config, str]) -> None:
    config, printed = several
    files = Artifacts(config.output)
    assert printed.index("== species ==") < printed.index(f"== {SIZE} ==") < printed.index("== all targets ==")
    table = [line.split("  ") for line in printed.partition("== all targets ==")[2].splitlines()]
    (row,) = (line for line in table if line[0] == SPECIES)
    cells = [cell.strip() for cell in row if cell.strip()]
    best = read_leaderboard(files.target(SPECIES)).best
    assert best.test is not None
    assert cells[:2] == [SPECIES, str(len(DatasetIndex.read(files.target(SPECIES) / "dataset").select("train")))]
    assert cells[3].startswith(f"{100 * best.test.accuracy:.1f} [")
    assert cells[5] == best.key
    page = (files.root / "report.html").read_text(encoding="utf-8")
    assert '<a href="targets/size%252F%252E%252E%252Fx/report.html">size/../x</a>' in page
    assert best.key in page


def test_a_target_goes_on_as_an_experiment_of_its_own(several: tuple[Config, str]) -> None:
    files = Artifacts(several[0].output)
    alone = configuration.load(files.target(SPECIES) / "config.yaml")
    assert alone.dataset == targets.experiments(several[0])[SPECIES].dataset
    run = extract.run(alone)
    assert run.scan.unchanged
    assert run.pending == 0
    printed = CliRunner().invoke(cli, ["heads", str(files.target(SPECIES) / "config.yaml")]).output
    assert "4 of 4 rows were finished before and kept." in printed
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
        "path", "status", SPECIES, f"{SPECIES}_probability", f"{SPECIES}_2", f"{SPECIES}_probability_2",
        SIZE, f"{SIZE}_low", f"{SIZE}_high", f"{SIZE}_note",
    ]  # fmt: skip
    for start, name in ((2, SPECIES), (6, SIZE)):
        alone = predict.run(Artifacts(output).target(name), [photos], output=tmp_path / "one.csv", top=2)
        with (tmp_path / "one.csv").open(encoding="utf-8", newline="") as file:
            assert [row[:2] + row[start : start + 4] for row in rows] == list(csv.reader(file))[1:]
        assert result.labels[name] == alone.labels[""]
    assert result.unreadable == 1
    assert [row[2:] for row in rows if row[1] != "ok"] == [[""] * 8]
    with pytest.raises(BundleError, match="has 2 targets, each in a folder of its own; load one of these"):
        Classifier.load(output)


def test_the_stores_commands_know_of_all_targets(several: tuple[Config, str], tmp_path: Path) -> None:
    config = several[0]
    files = Artifacts(config.output)
    assert maintenance.status(config)[0] == "36 images with 2 labels each, 36 distinct contents that decode"
    maintenance.export(config, tmp_path / "all.parquet", embedding="pixels")
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet")
    assert table.column(f"labels_{SIZE}").to_pylist() == DatasetIndex.read(files.dataset).column(SIZE).tolist()
    with pytest.raises(
        StoreError, match=r"a packed file has room for one column of labels; give the config\.yaml of one"
    ):
        maintenance.pack(config, tmp_path / "all.h5", embedding="pixels")
    copy = shutil.copytree(files.root, tmp_path / "output")
    moved = config.model_copy(update={"output": str(copy), "store": str(files.stores)})
    assert maintenance.verify_files(moved)[0]
    damaged = Artifacts(copy).target(SPECIES) / "leaderboard.json"
    damaged.write_text(damaged.read_text(encoding="utf-8").replace("ridge", "rigde"), encoding="utf-8")
    ok, lines = maintenance.verify_files(moved)
    assert not ok
    assert [line for line in lines if str(damaged) in line and "is damaged" in line]


def test_one_column_leaves_no_list_of_targets(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    files = Artifacts(config.output)
    index = scan(config.dataset, 0, files.dataset).index
    targets.write_experiments(config, index, ())
    assert list(files.each_target()) == [SPECIES, SIZE]
    targets.write_experiments(make_config(tmp_path, label_columns=[SPECIES], target="auto"), index, ())
    assert files.each_target() == {"": files.root}


def test_kinds_are_of_columns_that_there_are(tmp_path: Path) -> None:
    config = make_config(tmp_path, target={SPECIES: "classification"})
    assert [alone.dataset.target for alone in targets.experiments(config).values()] == ["classification", "auto"]
    heads = [[head.name for head in alone.heads or ()] for alone in targets.experiments(make_config(tmp_path)).values()]
    assert heads == [["nearest_centroid", "ridge"], ["ridge"]]
    with pytest.raises(PipelineError, match=r"dataset: target: unknown column 'specie', did you mean 'species'\?"):
        make_config(tmp_path, target={"specie": "classification"})


def test_commands_about_classes_take_the_columns_of_classes_or_say_in_a_line_what_to_set(
    several: tuple[Config, str], tmp_path: Path
) -> None:
    config = str(Artifacts(several[0].output).config)
    told = str(CliRunner().invoke(cli, ["layers", config]).exception)
    assert told.startswith("no network of this config has several layers or poolings to compare")
    told = str(CliRunner().invoke(cli, ["shortlist", config]).exception)
    assert (
        told == f"a shortlist needs a single column of classes; set dataset.label_columns to one of {SPECIES}, {SIZE}"
    )
    numbers = make_config(tmp_path, label_columns=[SIZE], target="regression", label_separator=None)
    for what in ("episodes are", "profiles of layers are", "shortlists are"):
        with pytest.raises(ConfigError, match=f"^{what} of classes, and dataset.target is regression$"):
            targets.of_classes(numbers, what)
    with pytest.raises(ConfigError, match=r"^shortlists are of classes"):
        shortlist.run(numbers)
