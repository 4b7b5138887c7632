"""The data audit finds what was planted, names little else, and gives tables of paths."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from documents import rewrite
from photos import crop, draw_photo, frame
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from pipeline.embed import baselines
from pipeline.errors import PipelineError
from pipeline.evaluation import audit
from pipeline.experiment import AUDIT, write_record
from pipeline.images import decode, hash_distances, perceptual_hash, prepare


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return (X / 16).astype(np.float32)[:1000], y[:1000]


def names(n: int, what: str = "image") -> list[str]:
    return [f"{what}/{row:04d}.png" for row in range(n)]


def precision_and_recall(found: set, planted: set) -> tuple[float, float]:
    return len(found & planted) / max(len(found), 1), len(found & planted) / len(planted)


def test_planted_wrong_labels_are_found(digits):
    """Of 50 flipped labels among 1,000 digits at least 80 % are found; at least 70 % of those named are flipped."""
    X, y = digits
    rng = np.random.default_rng(0)
    flipped = rng.choice(len(y), 50, replace=False)
    given = y.copy()
    given[flipped] = (y[flipped] + rng.integers(1, 10, 50)) % 10
    p = cross_val_predict(LogisticRegression(C=0.1, max_iter=300), X, given, cv=5, method="predict_proba")
    issues = audit.label_issues(p, given, [str(digit) for digit in range(10)], names(len(y)))
    found = issues.found
    precision, recall = precision_and_recall({item.row for item in found}, set(flipped.tolist()))
    assert precision >= 0.70
    assert recall >= 0.80
    top = found[:25]
    assert np.mean([item.row in set(flipped.tolist()) for item in top]) >= 0.95
    named = [item for item in found if item.row in set(flipped.tolist())]
    assert np.mean([item.suggested == str(y[item.row]) for item in named]) >= 0.9
    assert [item.probability for item in found] == [p[item.row, given[item.row]] for item in found]
    assert [item.probability for item in found] == sorted(item.probability for item in found)


def test_a_class_the_head_never_believes_accuses_nobody():
    """A rare class gets 0.3 at best; an absolute rule would call all of it mislabelled."""
    rng = np.random.default_rng(0)
    y = np.array([0] * 180 + [1] * 20)
    rare = np.clip(np.where(y == 1, 0.30, 0.05) + rng.normal(0, 0.01, 200), 0, 1)
    found = audit.label_issues(np.stack([1 - rare, rare], axis=1), y, ("common", "rare"), names(200)).found
    assert len([item for item in found if item.label == "rare"]) <= 2


def test_planted_copies_are_found_within_and_across_splits(digits):
    """Of 40 copies with noise all are found; at least 85 % of the pairs named are planted."""
    X, y = digits
    X, y = X[:600], y[:600]
    rng = np.random.default_rng(1)
    originals = rng.choice(600, 40, replace=False)
    copies = X[originals] + rng.normal(0, 0.02, (40, X.shape[1])).astype(np.float32)
    paths = names(600) + [f"copy/{row:04d}.png" for row in originals]
    splits = ["train"] * 600 + ["test"] * 20 + ["train"] * 20
    labels = [str(digit) for digit in np.concatenate([y, y[originals]])]
    found = audit.examine(np.concatenate([X, copies]), paths, labels, splits)[1].near_duplicates
    pairs = {tuple(sorted((pair.path, pair.other))) for pair in found}
    planted = {tuple(sorted((f"image/{row:04d}.png", f"copy/{row:04d}.png"))) for row in originals}
    precision, recall = precision_and_recall(pairs, planted)
    assert recall == 1.0
    assert precision >= 0.85
    across = [pair for pair in found if pair.across]
    assert len(across) >= 20
    assert found[: len(across)] == tuple(across), "what reaches the test comes first"


def test_a_burst_of_equal_frames_is_told_once_per_frame():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 16)).astype(np.float32)
    X[:12] = X[0] + rng.normal(0, 1e-3, (12, 16))
    found = audit.examine(X, names(100), ["a"] * 100, ["train"] * 100)[1].near_duplicates
    assert len(found) == 11
    assert {path for pair in found for path in (pair.path, pair.other)} == set(names(12))


def test_planted_outliers_are_found(digits):
    """Pictures of noise among digits: all are found, and few digits are called strange."""
    X, _ = digits
    noise = np.random.default_rng(0).uniform(0, 1, (10, X.shape[1])).astype(np.float32) * 1.5
    paths = names(len(X)) + names(10, "noise")
    found = audit.examine(np.concatenate([X, noise]), paths, ["a"] * len(paths), ["train"] * len(paths))[1].outliers
    precision, recall = precision_and_recall({item.path for item in found}, set(names(10, "noise")))
    assert recall == 1.0
    assert precision >= 0.8


def test_ordinary_data_have_next_to_nothing_wrong():
    X = np.random.default_rng(0).normal(size=(800, 32)).astype(np.float32)
    _, findings = audit.examine(X, names(800), ["a"] * 800, ["train"] * 800)
    assert findings.near_duplicates == ()
    assert len(findings.outliers) <= 4


def test_neighbours_equal_a_plain_search():
    X = np.random.default_rng(0).normal(size=(70, 5)).astype(np.float32)
    rows, found = audit.neighbours(X, 3)
    for row in range(70):
        distances = np.linalg.norm(X - X[row], axis=1)
        distances[row] = np.inf
        expected = np.argsort(distances)[:3]
        assert rows[row].tolist() == expected.tolist()
        assert found[row] == pytest.approx(distances[expected], rel=1e-5)


@pytest.mark.parametrize("shape", [(50, 8), (20, 40)])
def test_projection_keeps_distances_when_nothing_is_cut(shape):
    X = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    projected = audit.project(X)
    for a, b in [(0, 1), (3, 7), (10, 19)]:
        assert np.linalg.norm(projected[a] - projected[b]) == pytest.approx(np.linalg.norm(X[a] - X[b]), rel=1e-4)
    assert np.array_equal(audit.project(X), projected)


def test_two_images_and_one_image_are_no_trouble():
    for n in (1, 2):
        _, findings = audit.examine(
            np.arange(n * 3, dtype=np.float32).reshape(n, 3), names(n), ["a"] * n, ["train"] * n
        )
        assert findings.outliers == ()


FOUND = audit.Findings((audit.NearDuplicate("x.png", "y.png", 0.1, "train", "test", "a", "a"),))


def test_what_was_found_is_read_as_it_was_written(tmp_path):
    outlier = audit.Outlier("été \udcff.png", "a", 4.25, 7)
    for findings in (audit.Findings(), FOUND, audit.Findings(FOUND.near_duplicates * 2, (outlier,))):
        write_record(tmp_path / "audit.json", AUDIT, findings)
        assert audit.read_findings(tmp_path / "audit.json") == findings
    document = json.loads((tmp_path / "audit.json").read_text())
    del document["outliers"][0]["path"]
    rewrite(tmp_path / "audit.json", document)
    with pytest.raises(PipelineError, match=r"audit\.json: is damaged: .* run `manyheads heads` again"):
        audit.read_findings(tmp_path / "audit.json")


def test_tables_have_paths_and_survive_commas():
    issues = audit.LabelIssues((audit.LabelIssue("a,b/1.png", "a,b", "été", 0.0625, 3),))
    tables = audit.to_csv(issues, FOUND)
    assert list(csv.DictReader(io.StringIO(tables["label_issues.csv"]))) == [
        {"path": "a,b/1.png", "label": "a,b", "suggested": "été", "probability": "0.0625"}
    ]
    assert tables["near_duplicates.csv"].startswith(
        "path,other,ratio,split,other_split,label,other_label\nx.png,y.png,0.1,train,test"
    )
    assert tables["outliers.csv"] == "path,label,score\n"


def test_as_many_doubts_are_expected_of_right_labels_as_there_are():
    """Labels drawn from the very probabilities: none is wrong, and the audit says that all its doubts are to be expected."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.3), 2000)
    y = np.array([rng.choice(5, p=row) for row in p])
    issues = audit.label_issues(p, y, list("abcde"), names(2000))
    assert len(issues.found) > 50
    assert issues.expected == pytest.approx(len(issues.found), rel=0.1)
    assert audit.noise_rate(p, y) < 0.005
    flipped = rng.random(2000) < 0.1
    given = np.where(flipped, (y + rng.integers(1, 5, 2000)) % 5, y)
    assert audit.noise_rate(p, given) == pytest.approx(0.1, abs=0.03)
    with_errors = audit.label_issues(p, given, list("abcde"), names(2000))
    right = sum(not flipped[item.row] for item in with_errors.found)
    assert with_errors.expected == pytest.approx(right, rel=0.25)


def embedded(photos: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Return thumbnails of photos and their perceptual hashes."""
    embedder = baselines.load("pixels")
    pixels = [np.asarray(photo) for photo in photos]
    thumbnails = np.stack([prepare(image, embedder.preprocessing) for image in pixels])
    return embedder.embed(thumbnails)[0], np.stack([perceptual_hash(image) for image in pixels])


def joined(photos: list[Image.Image], hashed: bool = True) -> set[tuple[int, int]]:
    """Return the pairs that the audit names, as places in the list."""
    X, hashes = embedded(photos)
    n = len(photos)
    found = audit.examine(X, names(n), ["a"] * n, ["train"] * n, hashes if hashed else None)[1].near_duplicates
    return {(int(pair.path[6:10]), int(pair.other[6:10])) for pair in found}


@pytest.mark.parametrize("hashed", [True, False])
def test_frames_are_found_where_every_image_has_copies(hashed):
    """Six frames of each of 64 scenes: of the 320 pairs that join them more than 0.9 are found, and hardly another."""
    rng = np.random.default_rng(0)
    found = joined([frame(scene, rng) for scene in [draw_photo(rng) for _ in range(64)] for _ in range(6)], hashed)
    right = sum(a // 6 == b // 6 for a, b in found)
    assert right / 320 > 0.9
    assert right / len(found) > 0.99


CROPS = [(0.05, 0, 0, 0), (0, 0.05, 0, 0), (0.025,) * 4, (0.05, 0.05, 0, 0), (0, 0, 0.05, 0.05), (0.05,) * 4]


def test_crops_are_found_by_their_hashes():
    """Photos cropped by 5 %, among others and where every photo has one: more than 0.8 are found."""
    rng = np.random.default_rng(0)
    photos = [draw_photo(rng) for _ in range(120)]
    crops = [crop(photo, *CROPS[row % len(CROPS)]) for row, photo in enumerate(photos)]
    for count in (36, 120):
        found = joined([*photos, *crops[:count]])
        planted = {(row, 120 + row) for row in range(count)}
        assert len(found & planted) / count > 0.8
        assert len(found - planted) <= 1


def test_clean_photos_are_not_named():
    rng = np.random.default_rng(0)
    assert len(joined([draw_photo(rng) for _ in range(300)])) <= 1


CLOTHES = Path(__file__).parents[2] / "shared" / "data" / "clothing"


@pytest.mark.skipif(not CLOTHES.is_dir(), reason="the photos of clothes are not there")
def test_crops_and_frames_of_real_photos_are_found():
    paths = sorted(CLOTHES.rglob("*.jpg"))[::12]
    photos = [Image.fromarray(decode(path.read_bytes(), max_pixels=10**8)).reduce(2) for path in paths]
    clean = {row for pair in joined(photos) for row in pair}
    assert len(clean) / len(photos) < 0.01
    crops = [crop(photo, *CROPS[row % len(CROPS)]) for row, photo in enumerate(photos[:36])]
    found = joined([*photos, *crops])
    assert len(found & {(row, len(photos) + row) for row in range(36)}) / 36 > 0.8
    rng = np.random.default_rng(0)
    found = joined([frame(photo, rng) for photo in photos[36:68] for _ in range(6)])
    assert sum(a // 6 == b // 6 for a, b in found) / 160 > 0.9


def test_a_hash_outlives_what_is_done_to_copies():
    """Half the size, JPEG at quality 60, brighter, cropped: at most 8 % of the bits differ; of another photo a third do."""
    rng = np.random.default_rng(0)
    photo, other = draw_photo(rng), draw_photo(rng)
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=60)
    copies = [
        photo.resize((50, 66)),
        Image.open(buffer),
        Image.fromarray(np.clip(np.asarray(photo) * 1.1, 0, 255).astype(np.uint8)),
        crop(photo, 0.05, 0, 0, 0),
        crop(photo, 0.025, 0.025, 0.025, 0.025),
    ]
    hashes = np.stack([perceptual_hash(np.asarray(image)) for image in [photo, *copies, other]])
    distances = hash_distances(np.repeat(hashes[:1], 6, axis=0), hashes[1:])
    assert (distances[:5] <= audit.ALIKE_BITS).all(), distances
    assert distances[5] > 1 / 3
    assert np.array_equal(distances, hash_distances(hashes[1:], np.repeat(hashes[:1], 6, axis=0)))


@pytest.mark.parametrize(
    "pixels", [np.full((64, 64, 3), 130, np.uint8), np.eye(8, dtype=np.uint8)[..., None].repeat(3, 2)]
)
def test_flat_and_tiny_images_are_not_alike_by_hash(pixels):
    told = perceptual_hash(pixels)[None]
    assert not told.any()
    assert hash_distances(told, told).tolist() == [1.0]
