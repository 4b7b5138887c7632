"""Images of no known class: false alarms as stated, sets that hold the truth as often as asked, and what bundles keep for it."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_experiment import material, row, section, words
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from pipeline.config import Config
from pipeline.errors import BundleError, ConfigError
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.evaluation.strangeness import Reference, alike, auroc, directions, distance, label_sets, unsureness
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.stages import predict, train_heads


@pytest.mark.parametrize("asked", [0.02, 0.05, 0.2])
def test_of_images_like_the_known_ones_no_more_than_asked_are_called_unknown(asked):
    rng = np.random.default_rng(0)
    shares = [np.mean(alike(rng.exponential(size=200), rng.exponential(size=150)) <= asked) for _ in range(300)]
    assert asked - 0.01 <= np.mean(shares) <= asked + 0.002


def test_an_image_is_as_strange_as_its_rank():
    known = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(alike(np.array([0.0, 0.25, 0.4, 9.0]), known), [1.0, 0.6, 0.4, 0.2])


def test_auroc_is_the_one_of_scikit_learn():
    rng = np.random.default_rng(0)
    known, unknown = rng.integers(0, 8, 60).astype(float), rng.integers(2, 10, 40).astype(float)
    expected = roc_auc_score(np.r_[np.zeros(60), np.ones(40)], np.r_[known, unknown])
    assert auroc(known, unknown) == pytest.approx(expected)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])  # too unsure, right, too sure
def test_sets_hold_the_true_label_as_often_as_asked_however_wrong_the_probabilities(sharpness):
    rng, held, sizes = np.random.default_rng(0), [], []
    for _ in range(40):
        logits = rng.normal(0, 1.3, (400, 5))
        y = np.array([rng.choice(5, p=p) for p in softmax(logits, axis=1)])
        p = softmax(sharpness * logits, axis=1)
        of_truth = p[:200][np.arange(200), y[:200]]
        sets = label_sets(p[200:], of_truth, 0.9)
        assert sets[np.arange(200), p[200:].argmax(axis=1)].all()
        held.append(sets[np.arange(200), y[200:]].mean())
        sizes.append(sets.sum(axis=1).mean())
    assert 0.89 <= np.mean(held) <= 0.92
    assert 1 < np.mean(sizes) < 5


def test_distance_is_the_nth_lowest_of_one_minus_cosine():
    rng = np.random.default_rng(0)
    X, references = rng.normal(size=(30, 7)).astype(np.float32), rng.normal(size=(50, 7)).astype(np.float32)
    mean = references.mean(axis=0)
    a, b = directions(X, mean), directions(references, mean)
    expected = np.sort(1 - a @ b.T, axis=1)[:, 2]
    np.testing.assert_allclose(distance(a, b, 3), expected, atol=1e-6)
    np.testing.assert_allclose(distance(a, b[:2], 5), np.sort(1 - a @ b[:2].T, axis=1)[:, -1], atol=1e-6)


def test_what_is_kept_comes_back_and_anything_else_is_refused():
    rng = np.random.default_rng(0)
    rows = directions(rng.normal(size=(9, 4)), 0.0)
    known = Reference(rng.normal(size=4).astype(np.float32), rows, rng.random(20), np.ones(9))
    found = Reference.from_bytes(known.to_bytes())
    np.testing.assert_allclose(found.references, known.references, atol=1e-3)
    np.testing.assert_array_equal(found.distances, known.distances)
    for wrong in (dataclasses.replace(known, mean=np.zeros(5)), dataclasses.replace(known, distances=np.zeros(0))):
        with pytest.raises(ValueError, match="arrays of shapes"):
            Reference.from_bytes(wrong.to_bytes())


def test_unsureness_is_what_the_likeliest_label_leaves():
    np.testing.assert_allclose(unsureness(np.array([[0.7, 0.3], [0.5, 0.5]])), [0.3, 0.5])


# In an experiment


def best_of(config: Config) -> Path:
    return predict.find_bundle(Path(config.output))


@pytest.fixture
def copied(experiment: Config, tmp_path: Path) -> Config:
    output = shutil.copytree(experiment.output, tmp_path / "output")
    shutil.copytree(Artifacts(experiment.output).stores, tmp_path / "features")
    return experiment.model_copy(update={"output": str(output)})


def test_heads_leave_classes_out_once_and_the_bundle_knows_of_it(copied: Config):
    board = read_leaderboard(Path(copied.output))
    record = board.provenance["unknown"][board.best.key]
    assert sorted(label for group in record["groups"] for label in group["classes"]) == list(board.target.classes)
    assert record["score"] == max(record["auroc"], key=lambda name: record["auroc"][name])
    document = bundles.describe(best_of(copied))
    assert document["unknown"] == record
    before = (best_of(copied) / "bundle.json").stat().st_mtime_ns
    train_heads.run(copied)
    assert (best_of(copied) / "bundle.json").stat().st_mtime_ns == before
    (best_of(copied) / "known.npz").unlink()
    train_heads.run(copied)
    assert bundles.describe(best_of(copied))["unknown"] == record
    assert (best_of(copied) / "known.npz").exists()


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_predict_marks_strange_images_gives_sets_and_says_that_the_batch_has_drifted(copied: Config, tmp_path: Path):
    odd = tmp_path / "odd"
    odd.mkdir()
    for number in range(8):
        pixels = np.indices((24, 20)).sum(axis=0) % 2 * (255 - number)
        Image.fromarray(np.stack([pixels, 255 - pixels, pixels], axis=2).astype(np.uint8)).save(odd / f"{number}.png")
    (odd / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    known = Path(str(copied.dataset.path))
    done = predict.run(best_of(copied), [odd, known], output=tmp_path / "said.csv", unknown=0.1, sets=0.9)
    rows = cells(tmp_path / "said.csv")
    assert list(rows[0])[-3:] == ["strangeness", "unknown", "label_set"]
    told = {True: [], False: []}
    for found in rows:
        if found["status"] == "ok":
            told["odd" in Path(found["path"]).parts].append(found)
            assert found["label"] in found["label_set"].split("|")
        else:
            assert (found["strangeness"], found["unknown"], found["label_set"]) == ("", "", "")
    assert all(found["unknown"] == "unknown" for found in told[True])
    assert sum(found["unknown"] == "unknown" for found in told[False]) <= 6
    assert all(0 <= float(found["strangeness"]) <= 1 for found in told[True])
    text = "\n".join(done.summary_lines())
    assert re.search(
        r"unknown: \d+ of 44 images \([\d.]+ %\), by .*; of images like those of training it would be 10 %", text
    )
    predict.run(best_of(copied), [odd], output=tmp_path / "odd.csv")
    assert "unknown" not in cells(tmp_path / "odd.csv")[0]
    assert "this batch has drifted" in "\n".join(
        predict.run(best_of(copied), [odd], output=tmp_path / "o.csv").summary_lines()
    )


def test_what_cannot_be_promised_is_an_error_that_says_so(copied: Config, tmp_path: Path):
    photos = [Path(str(copied.dataset.path))]
    with pytest.raises(ConfigError, match=r"--unknown: 0\.001 must be from 0\.03\d, the least for \d+ images, to 1"):
        predict.run(best_of(copied), photos, output=tmp_path / "a.csv", unknown=0.001)
    with pytest.raises(ConfigError, match=r"--sets: 90 must be between 0 and 1, such as 0\.9"):
        predict.run(best_of(copied), photos, output=tmp_path / "a.csv", sets=90)
    with (best_of(copied) / "known.npz").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(BundleError, match=r"known\.npz: is damaged"):
        predict.run(best_of(copied), photos, output=tmp_path / "a.csv", unknown=0.1)


def test_a_head_that_was_not_tested_goes_by_its_probabilities(copied: Config, tmp_path: Path):
    board = read_leaderboard(Path(copied.output))
    other = next(
        found
        for found in board.rows
        if found.key not in board.provenance["unknown"] and found.embedding == board.best.embedding
    )
    done = predict.run(
        Path(copied.output) / str(other.bundle),
        [Path(str(copied.dataset.path))],
        output=tmp_path / "a.csv",
        unknown=0.1,
    )
    assert any("by probability" in line for line in done.summary_lines())
    assert not any(line.startswith("drift") for line in done.summary_lines())


def test_the_page_tells_how_well_classes_left_out_were_found():
    group = {"classes": ["a", "b"], "distance": {"auroc": 0.8125, "found": 0.25}}
    record = {
        "groups": [group],
        "auroc": {"distance": 0.8125},
        "score": "distance",
        "false_alarms": {"asked": 0.05, "found": 0.04, "images": 100},
    }
    best = row("ridge", 0.9)
    html = section("unknown", material([best], provenance={"unknown": {best.key: record}}))
    text = words(html)
    assert "uses distance, the best score: AUROC 0.81 on average. It marks 4.0 % of the 100 test images" in text
    assert "a, b 0.812 25.0" in text
    assert section("unknown", material([best])) == ""
