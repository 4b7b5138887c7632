"""Look and ask: nearest images, images without labels, what to label next, a cleaned manifest, accuracy by folders."""

from __future__ import annotations

import csv
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from photos import make_photos, small_config
from PIL import Image

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.data.index import texts
from pipeline.data.scan import scan
from pipeline.errors import BackboneError, DatasetError, PipelineError, StoreError
from pipeline.evaluation.audit import Findings, LabelIssue, LabelIssues, NearDuplicate, Outlier
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.evaluation.picking import typical, unsure
from pipeline.experiment import Artifacts
from pipeline.io.digests import Digests
from pipeline.stages import clean, extract, maintenance, pick, predict, similar, train_heads
from pipeline.stages.load import load
from pipeline.store import rows as store_rows
from pipeline.store.reader import FeatureStore
from pipeline.store.rows import Nearest
from pipeline.store.share import read_vectors
from pipeline.store.writer import StoreWriter

EMBEDDING = "squeezenet1_1-random-penultimate"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_labels(photos: Path, output: Path) -> Config:
    """The small experiment's config for a folder whose images lie anywhere."""
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        path.rename(photos / f"{number:03d}.png")
    return small_config(photos, output)


# ---- the search


def stored(folder: Path, X: NDArray[np.float32]) -> tuple[FeatureStore, Digests]:
    digests = np.stack([np.arange(len(X)), np.ones(len(X))], axis=1).astype(np.uint64)
    with StoreWriter.open(folder / "x.store", {"what": "test"}, X.shape[1]) as writer:
        writer.append(digests, X)
    return FeatureStore.open(folder / "x.store"), digests


def test_the_search_is_that_of_all_pairs_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_rows, "COPY_BYTES", 50 * 4 * 16)  # seven blocks
    rng = np.random.default_rng(0)
    X = rng.normal(size=(333, 16)).astype(np.float32)
    X[200] = 2 * X[100]  # the same direction
    X[7] = 0  # none at all
    X[300] = X[100] + np.float32(1e-4) * X[101]  # nearer than a float32 product can tell
    store, digests = stored(tmp_path, X)
    queries = np.concatenate([X[[100]], rng.normal(size=(4, 16)).astype(np.float32)])
    order = rng.permutation(333)
    places, distances = Nearest.of(store, digests[order]).find(queries, 9)
    units = [
        a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-30)
        for a in (queries.astype(float), X.astype(float))
    ]
    expected = 1 - units[0] @ units[1].T
    assert places.shape == (5, 9)
    assert {*order[places[0, :2]]} == {100, 200}
    assert order[places[0, 2]] == 300
    for row in range(5):
        np.testing.assert_allclose(distances[row], np.sort(expected[row])[:9], atol=1e-6)
        np.testing.assert_allclose(expected[row][order[places[row]]], distances[row], atol=1e-6)
    assert Nearest.of(store, digests[:3]).find(queries, 9)[0].shape == (5, 3)


def test_an_image_is_not_its_own_neighbour_and_a_copy_of_it_is(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", per_class=4)
    shutil.copy(photos / "leaf" / "00.png", photos / "leaf" / "copy.png")
    config = small_config(photos, tmp_path / "output")
    extract.run(config)
    given = photos / "leaf" / "00.png"
    found = similar.run([given], Path(config.output), embedding=EMBEDDING, count=3).found[str(given)]
    assert len(found) == 3
    assert (found[0].path, found[0].label) == (str(photos / "leaf" / "copy.png"), "leaf")
    assert found[0].distance < 1e-12 < found[1].distance
    assert str(given) not in [each.path for each in found]


def test_a_new_image_is_embedded_as_the_stored_ones_were(experiment: Config, tmp_path: Path) -> None:
    root = DatasetIndex.read(Artifacts(experiment.output).dataset).root
    new, broken = tmp_path / "=new.png", tmp_path / "broken.png"
    Image.open(root / "土" / "03.png").save(new, compress_level=0)  # the same pixels in other bytes
    broken.write_bytes(b"no image")
    result = similar.run([tmp_path], Path(experiment.output), count=100, output=tmp_path / "near.csv")
    near = result.found[str(new)]
    assert near[0].path == str(root / "土" / "03.png")
    assert near[0].distance < 1e-6
    assert near[0].label == "土"
    assert [each.distance for each in near] == sorted(each.distance for each in near)
    assert len(near) == 36
    assert list(result.problems) == [str(broken)]
    rows = read(tmp_path / "near.csv")
    assert [rows[0][name] for name in ("rank", "label", "path")] == ["1", "土", str(root / "土" / "03.png")]
    assert "not an image of a known format" in result.summary_lines()[-3]


def test_similar_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos = make_photos(tmp_path / "photos", per_class=1)
    with pytest.raises(PipelineError, match=r"name an experiment, .* with --in; there is none in artifacts/"):
        similar.run([photos])
    with pytest.raises(
        PipelineError, match=r"has no features yet; run `manyheads features photos`, or `manyheads embed photos`"
    ):
        similar.run([photos], Path("photos"))
    with pytest.raises(DatasetError, match="no such file"):
        similar.run([Path("nothing.jpg")])


# ---- images without labels


def test_images_without_labels_are_embedded_once_and_learned_from_when_they_have_some(tmp_path: Path) -> None:
    loose = without_labels(make_photos(tmp_path / "loose"), tmp_path / "unlabelled")
    (tmp_path / "loose" / "more").mkdir()
    (tmp_path / "loose" / "000.png").rename(tmp_path / "loose" / "more" / "000.png")
    first = extract.without_labels(loose)
    assert first.summary_lines()[0] == "36 images without labels"
    assert first.work is not None
    assert first.work.images == 36
    assert extract.without_labels(loose).work is None
    assert set(first.scan.index.labels) == {""}
    with pytest.raises(DatasetError, match="embedded without labels, so there is nothing to learn from"):
        train_heads.run(loose)
    near = similar.run([tmp_path / "loose" / "001.png"], tmp_path / "unlabelled", embedding=EMBEDDING, count=2)
    assert [each.label for each in near.found[str(tmp_path / "loose" / "001.png")]] == ["", ""]

    labelled = small_config(make_photos(tmp_path / "photos"), tmp_path / "output")  # the same images, sorted
    assert extract.run(labelled).work is None
    with pytest.raises(PipelineError, match="has an experiment with labels; `manyheads features` embeds"):
        extract.without_labels(labelled)


def test_a_manifest_of_images_without_labels_needs_no_label_column(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", per_class=1)
    (photos / "list.csv").write_text("path\nleaf/00.png\n土/00.png\n", encoding="utf-8")
    raw = {"source": "manifest", "path": str(photos / "list.csv"), "target": "none"}
    dataset = configuration.parse({"dataset": raw, "backbones": [{"name": "any"}]}, "test").dataset
    found = scan(dataset, 0, tmp_path / "dataset").index
    assert (found.paths.tolist(), found.labels.tolist()) == (["leaf/00.png", "土/00.png"], ["", ""])


# ---- what to label next


def blobs(sizes: list[int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(len(sizes)), sizes)
    return (np.eye(len(sizes), 8)[y] + rng.normal(0, 0.05, (len(y), 8))).astype(np.float32), y


def test_the_first_picks_are_of_every_kind_the_commonest_first() -> None:
    X, y = blobs([10, 40, 20, 30])
    rows = typical(X, np.zeros(100, bool), 4, seed=0)
    assert y[rows].tolist() == [1, 3, 2, 0]
    labelled = np.zeros(100, bool)
    labelled[rows[:2]] = True
    after = typical(X, labelled, 2, seed=0)
    assert not labelled[after].any()
    assert {*y[after]} == {2, 0}
    assert len({*typical(X, labelled, 98, seed=0).tolist()}) == 98


def test_unsure_picks_are_unsure_and_unlike_one_another() -> None:
    X, y = blobs([50, 50, 50])
    sure = np.tile([0.98, 0.02], (150, 1))
    doubted = np.flatnonzero(np.arange(150) % 5 == 0)
    sure[doubted] = [0.51, 0.49]
    sure[doubted[0]] = [0.5, 0.5]
    rows = unsure(X, sure, 3, seed=0)
    assert rows[0] == doubted[0]
    assert {*rows.tolist()} <= {*doubted.tolist()}
    assert sorted(y[rows]) == [0, 1, 2]


def test_pick_leaves_out_what_is_labelled_and_says_why_it_picks(experiment: Config, tmp_path: Path) -> None:
    new = make_photos(tmp_path / "new", per_class=3, seed=1)
    known = DatasetIndex.read(Artifacts(experiment.output).dataset)
    for number in (0, 1):
        shutil.copy(known.root / known.paths[number], new / f"known{number}.png")
    result = pick.run(
        small_config(new, tmp_path / "new-output"), Path(experiment.output), count=4, output=tmp_path / "next.csv"
    )
    rows = read(tmp_path / "next.csv")
    assert (result.picked, result.images) == (4, 9)
    assert not [row for row in rows if "known" in row["path"]]
    assert {row["why"] for row in rows} == {"unsure"}
    assert all(0.33 < float(row["probability"]) <= 1 for row in rows)
    assert {row["label"] for row in rows} == {""}
    assert {row["suggested"] for row in rows} <= {*known.classes}
    assert "the 30 labelled training images are 10 per class, and from 10 on" in result.phase
    assert result.gain.startswith("not known: too few labelled images")
    with pytest.raises(DatasetError, match="exists already, and may have labels"):
        pick.run(small_config(new, tmp_path / "new-output"), output=tmp_path / "next.csv")
    labelled = small_config(known.root, tmp_path / "old-output")
    with pytest.raises(
        DatasetError, match=f"of {len(known)} different ones {len(known)} are among those with labels, 0 cannot"
    ):
        pick.run(labelled, Path(experiment.output), output=tmp_path / "more.csv")


# ---- a cleaned manifest


def test_a_cleaned_manifest_proposes_and_relabels_nothing() -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    splits = ["train", "test", "train", "train", "excluded", "train"]
    groups = ["", "film 1", "", "film 1", "", ""]
    index = DatasetIndex(
        Path(),
        texts(names),
        texts(list("xxyyxx")),
        texts(splits),
        texts(groups),
        np.zeros((6, 2), np.uint64),
        np.zeros(6, np.int64),
    )
    pairs = (
        NearDuplicate("a", "b", 0.1, "train", "test", "x", "x"),
        NearDuplicate("c", "f", 0.2, "train", "train", "y", "x"),
    )
    issues = LabelIssues((LabelIssue("d", "y", "x", 0.01, 3), LabelIssue("c", "y", "x", 0.2, 2)), expected=1.2)
    found = clean.ManifestCells.of(index, Findings(pairs, (Outlier("f", "x", 5.0, 5),)), issues)
    assert found.splits == ["excluded", "test", "train", "excluded", "excluded", "train"]
    assert found.groups == ["film 1", "film 1", "alike 2", "film 1", "", "alike 2"]
    assert found.changes == ["left out", "grouped", "grouped", "left out", "left out", "grouped"]
    assert found.reasons[0] == ["nearly the same as b, labelled 'x', a test image"]
    assert found.reasons[2] == [
        "check its label: held out, the best head gives 'y' 0.200 and takes it for 'x'",
        "nearly the same as f, labelled 'x'",
    ]
    assert found.reasons[3] == [
        "its label is likely wrong: held out, the best head gives 'y' 0.010 and takes it for 'x'"
    ]
    assert found.reasons[5][1] == "like no other image: 5.0 deviations above the median"


def test_a_cleaned_manifest_goes_back_in(experiment: Config, tmp_path: Path) -> None:
    output = tmp_path / "cleaned.csv"
    result = clean.run(experiment, output)
    with pytest.raises(DatasetError, match="exists already, and may have been edited"):
        clean.run(experiment, output)
    lines = output.read_text(encoding="utf-8").splitlines()
    output.write_text("\n".join([lines[0], lines[1].replace(",train,", ",excluded,"), *lines[2:]]), encoding="utf-8")
    *_, command = result.summary_lines()
    program, given, *words = shlex.split(command)
    assert program == "manyheads"
    overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    again = configuration.load(Path(given), overrides)
    before, after = (
        DatasetIndex.read(Artifacts(experiment.output).dataset),
        scan(again.dataset, again.seed, tmp_path / "d").index,
    )
    assert after.paths.tolist() == before.paths.tolist()
    assert after.labels.tolist() == before.labels.tolist()
    assert after.splits.tolist() == ["excluded", *(row["split"] for row in read(output)[1:])]
    assert result.suspicious + result.alike == sum(row["change"] == "left out" for row in read(output))


# ---- accuracy by folders


def test_predict_says_how_often_it_agrees_with_class_folders(experiment: Config, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", per_class=4, seed=5)
    (photos / "土").rename(photos / "misc")
    result = predict.run(Path(experiment.output), [photos], output=tmp_path / "out.csv")
    rows = [row for row in read(tmp_path / "out.csv") if "misc" not in row["path"]]
    right = sum(row["label"] == Path(row["path"]).parent.name for row in rows)
    lines = result.summary_lines()
    (accuracy,) = [line for line in lines if line.startswith("accuracy")]
    assert accuracy.startswith(f"accuracy {100 * right / 8:.1f} % [")
    assert accuracy.endswith(f"{right} of 8 images are labelled with the name of their folder")
    assert "not counted: 4 images in folders that are no known class" in lines


def test_predict_does_not_count_what_the_head_has_learned_from(experiment: Config, tmp_path: Path) -> None:
    index = DatasetIndex.read(Artifacts(experiment.output).dataset)
    tested, taught = len(index.select("test")), len(index.select("train"))
    lines = predict.run(Path(experiment.output), [index.root], output=tmp_path / "out.csv").summary_lines()
    assert any(f"of {tested} images are labelled with" in line for line in lines)
    assert f"not counted: {taught} training images, which the head has learned from" in lines


def test_predict_says_nothing_of_folders_that_are_no_classes(experiment: Config, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", per_class=1, seed=5)
    for number, folder in enumerate(sorted(photos.iterdir())):
        folder.rename(photos / f"2024-{number:02d}")
    lines = predict.run(Path(experiment.output), [photos], output=tmp_path / "out.csv").summary_lines()
    assert not [line for line in lines if "accuracy" in line or "not counted" in line]


def test_an_archive_is_embedded_as_it_is_and_searched(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", per_class=2)
    archive = Path(shutil.make_archive(str(tmp_path / "all"), "zip", photos))
    config = small_config(archive, tmp_path / "output")
    found = extract.without_labels(config)
    assert found.summary_lines()[0] == "6 images without labels"
    near = similar.run([archive / "leaf" / "00.png"], tmp_path / "output", embedding=EMBEDDING, count=9)
    assert len(near.found[str(archive / "leaf" / "00.png")]) == 5


# ---- vectors of the user's own


@pytest.fixture(scope="module")
def vectors(experiment: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A Parquet file of the experiment's own vectors, as `store export` writes it, in another order, and the paths in its order."""
    path = tmp_path_factory.mktemp("vectors") / "mine.parquet"
    maintenance.export(experiment, path, embedding=EMBEDDING)
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    return path, pq.read_table(path)["paths"].to_pylist()


def on_vectors(experiment: Config, path: Path, output: Path) -> Config:
    raw = experiment.model_dump(mode="json", exclude={"output", "store", "backbones", "heads", "baselines"})
    own = {"output": str(output), "backbones": [{"name": str(path)}], "heads": ["nearest_centroid"], "baselines": []}
    return configuration.parse({**raw, **own}, "test")


def test_heads_on_vectors_of_a_file_are_those_on_the_vectors_that_made_it(
    experiment: Config, vectors: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config = on_vectors(experiment, vectors[0], tmp_path / "output")
    extract.run(config)
    (row,) = train_heads.run(config).leaderboard.rows
    same = read_leaderboard(Path(experiment.output)).row(f"{EMBEDDING}/nearest_centroid")
    assert row.embedding == "mine.parquet"
    assert row.cv_scores == same.cv_scores

    index = DatasetIndex.read(Artifacts(config.output).dataset)
    X = read_vectors(vectors[0])[1][np.argsort(vectors[1])]  # in the order of the index
    np.save(tmp_path / "mine.npy", X)
    assert index.paths.tolist() == sorted(vectors[1])
    by_order = on_vectors(experiment, tmp_path / "mine.npy", tmp_path / "by_order")
    extract.run(by_order)
    np.testing.assert_array_equal(load(by_order.output).X[:], load(config.output).X[:])

    said = predict.run(Path(config.output), [vectors[0]], output=tmp_path / "out.csv")
    assert [row["path"] for row in read(tmp_path / "out.csv")] == vectors[1]
    assert sum(said.labels[""].values()) == 36
    predict.run(Path(config.output), [tmp_path / "mine.npy"], output=tmp_path / "other.csv")
    assert sorted(row["label"] for row in read(tmp_path / "other.csv")) == sorted(
        row["label"] for row in read(tmp_path / "out.csv")
    )
    with pytest.raises(BackboneError, match=r"mine.parquet holds precomputed .* to predict, give a .npy or .parquet"):
        predict.run(Path(config.output), [index.root], output=tmp_path / "out.csv")
    with pytest.raises(BackboneError, match=r"mine.parquet holds precomputed vectors of an unknown network"):
        similar.run([tmp_path / "mine.npy"], Path(config.output))


def test_a_changed_file_of_vectors_is_another_embedding(
    experiment: Config, vectors: tuple[Path, list[str]], tmp_path: Path
) -> None:
    X = read_vectors(vectors[0])[1]
    np.save(tmp_path / "a.npy", X)
    config = on_vectors(experiment, tmp_path / "a.npy", tmp_path / "output")
    first = extract.run(config).records[0].fingerprint
    assert extract.run(config).records[0].fingerprint == first
    np.save(tmp_path / "a.npy", -X)
    assert extract.run(config).records[0].fingerprint != first
    np.testing.assert_array_equal(load(config.output).X[:], -X)


def test_what_is_wrong_with_a_file_of_vectors_is_said(
    experiment: Config, vectors: tuple[Path, list[str]], tmp_path: Path
) -> None:
    table = pq.read_table(vectors[0])
    pq.write_table(table.slice(2), tmp_path / "few.parquet")
    with pytest.raises(StoreError, match=r"few.parquet: has no vector for 2 images"):
        extract.run(on_vectors(experiment, tmp_path / "few.parquet", tmp_path / "output"))
    np.save(tmp_path / "few.npy", np.zeros((35, 4)))
    with pytest.raises(StoreError, match="has 35 vectors, and the data set names 36 images that are there"):
        extract.run(on_vectors(experiment, tmp_path / "few.npy", tmp_path / "output"))
    np.save(tmp_path / "nan.npy", np.full((36, 4), np.nan))
    np.save(tmp_path / "flat.npy", np.zeros(36))
    (tmp_path / "text.npy").write_text("no")
    pq.write_table(pa.table({"path": ["a"], "v": [[[1.0]]], "w": [[2.0]]}), tmp_path / "odd.parquet")
    for name, why in {
        "nan.npy": "36 vectors have numbers that are not finite",
        "flat.npy": r"it holds float64 of shape \(36,\)",
        "text.npy": "cannot be read as vectors",
        "odd.parquet": "cannot be read as vectors",
        "none.npy": "No such file",
    }.items():
        with pytest.raises(BackboneError, match=why):
            extract.run(on_vectors(experiment, tmp_path / name, tmp_path / "output"))
