"""Shortlist: the sample, the judges, what is dropped and what is said, and that a full run embeds the sample no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from photos import make_photos, small_config
from scipy import optimize, stats

from pipeline.cli import cli
from pipeline.config import BackboneConfig, Config
from pipeline.embed import timm_models
from pipeline.embed.baselines import load
from pipeline.embed.published import Fetch
from pipeline.errors import BackboneError, PipelineError
from pipeline.evaluation import Predictions
from pipeline.evaluation.learning_curve import stratified_order
from pipeline.evaluation.logme import logme
from pipeline.heads.tuning import make_folds
from pipeline.stages import extract, settings, shortlist
from pipeline.stages.shortlist import Entry, Shortlist

# ---- LogME


def evidence(X: np.ndarray, target: np.ndarray) -> float:
    """The largest log density of one class's labels by the normal law itself, its precisions searched."""

    def minus(logs: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        covariance = np.eye(len(X)) / beta + X @ X.T / alpha
        return -float(stats.multivariate_normal(np.zeros(len(X)), covariance).logpdf(target))

    tight = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000}
    return -min(optimize.minimize(minus, start, method="Nelder-Mead", options=tight).fun for start in ([0, 0], [2, 2]))


@pytest.mark.parametrize("shape", [(30, 6), (14, 25)])
def test_logme_is_the_largest_evidence_of_the_linear_model(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=shape)
    y = rng.permutation((X[:, 0] + 0.4 * rng.normal(size=shape[0]) > 0).astype(np.int64) + 2 * (X[:, 1] > 1))
    expected = np.mean([evidence(X, (y == code).astype(float)) for code in np.unique(y)]) / len(y)
    assert logme(X, y) == pytest.approx(expected, abs=1e-5)


def test_logme_sees_no_rotation_or_scale_and_prefers_features_that_tell_the_classes() -> None:
    rng = np.random.default_rng(1)
    y = np.arange(60) % 3
    good, noise = np.eye(3)[y] @ rng.normal(size=(3, 8)) + 0.3 * rng.normal(size=(60, 8)), rng.normal(size=(60, 8))
    turned = good @ np.linalg.qr(rng.normal(size=(8, 8)))[0] * 7
    assert logme(turned, y) == pytest.approx(logme(good, y), abs=1e-8)
    assert logme(good, y) > logme(noise, y) + 0.2
    assert logme(good[:, :, None].repeat(2, 2).reshape(60, 16), y) == pytest.approx(logme(good, y), abs=1e-6)


# ---- the sample and the judges


def test_every_beginning_of_the_sample_has_the_classes_in_proportion() -> None:
    labels = np.array(["a"] * 600 + ["b"] * 300 + ["c"] * 90 + ["rare"] * 10, dtype=object)
    rows = stratified_order(labels, 0)
    assert sorted(rows.tolist()) == list(range(1000))
    for n in (100, 250, 500):
        names, counts = np.unique(labels[rows[:n]], return_counts=True)
        shares = dict(zip(names.tolist(), counts.tolist(), strict=True))
        assert all(abs(shares[name] - n * share) <= 1 for name, share in zip("abc", (0.6, 0.3, 0.09), strict=True))
        assert shares["rare"] >= 1
    assert stratified_order(labels, 0).tolist() == rows.tolist()
    assert stratified_order(labels, 1).tolist() != rows.tolist()


def test_the_judge_is_the_one_that_is_right_most_often() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(120) % 2
    linear = (rng.normal(size=(120, 30)) + 0.8 * y[:, None]).astype(np.float32)
    folds = make_folds(y, 5, 0)
    head, guesses = shortlist.best_guesses(linear, y, folds, 0)
    assert np.mean(guesses == y) > 0.9
    quadrants = (
        np.abs(rng.normal(size=(120, 2))) * rng.choice([-1, 1], (120, 1)) * np.where(y[:, None] == 0, 1, [1, -1])
    )
    assert shortlist.best_guesses(quadrants.astype(np.float32), y, folds, 0)[0] == "knn", "no line tells them"
    assert head == "ridge"


# ---- what is dropped and said


def entry(name: str, right: int, parameters: int, seconds: float, evidence: float = 0.0) -> Entry:
    """A network that is right about the first so many of 200 images; a baseline where it has no parameters."""
    y = np.arange(200) % 2
    guesses = np.where(np.arange(200) < right, y, 1 - y)
    (spec,) = load("pixels").specs
    candidate = BackboneConfig(name=name) if parameters else name
    return Entry(
        candidate, replace(spec, name=name), "ridge", Predictions(y, guesses), evidence, parameters, 0.0, seconds
    )


def judged(*entries: Entry, final: bool = True) -> dict[str, Entry]:
    return shortlist._compared({each.spec.name: each for each in entries}, 0, final)


def test_of_the_worse_half_those_that_are_shown_to_be_worse_are_dropped() -> None:
    three = entry("best", 190, 9, 1), entry("near", 188, 5, 2), entry("far", 120, 7, 3), entry("low", 60, 1, 4)
    assert {name for name, each in judged(*three, final=False).items() if each.dropped} == {"far", "low"}
    close = entry("best", 190, 9, 1), entry("near", 188, 5, 2), entry("same", 187, 7, 3), entry("too", 186, 1, 4)
    assert not any(each.dropped for each in judged(*close, final=False).values())
    done = judged(*three)
    assert {name for name, each in done.items() if each.tied} == {"best", "near"}
    assert not any(each.dropped for each in done.values())


def listed(*entries: Entry) -> Shortlist:
    return Shortlist(entries, 200, 900, (), Path("s.yaml"))


def lines(*entries: Entry) -> str:
    done = sorted(judged(*entries).values(), key=lambda each: -each.accuracy)
    return "\n".join(listed(*done).summary_lines())


def test_size_is_said_to_have_told_it_only_where_it_did() -> None:
    small, large = entry("small", 190, 10, 0.01, evidence=2.0), entry("large", 120, 90, 0.05, evidence=1.0)
    said = lines(small, large)
    assert "size alone" not in said
    assert "LogME alone would have told you this: small is the likeliest." in said
    assert "use small: all others are shown to be worse" in said
    said = lines(replace(small, parameters=100), large)
    assert "size alone would have told you this: small is the largest." in said
    said = lines(small, entry("large", 189, 90, 0.05), entry("hog", 188, 0, 0.001))
    assert "size alone" not in said
    assert "~ these cannot be told apart from small on 200 images." in said
    assert "use small: the best; no faster one is shown to be nearly as good on these images. These images" in said
    assert said.count("These images do not show that a network helps: see hog\n") == 1
    assert "use hog: all others are shown to be worse. These images do not show that a network helps: see hog" in lines(
        entry("small", 60, 10, 0.01), entry("hog", 190, 0, 0.001)
    )


def test_a_quicker_network_is_recommended_where_it_is_shown_to_be_nearly_as_good() -> None:
    near = entry("near", 100, 10, 0.01)
    worse = replace(near, tied=True, behind=0.03), replace(near, tied=True, behind=0.2)
    first = replace(entry("best", 170, 90, 0.05), tied=True)
    assert listed(first, worse[0]).chosen.spec.name == "near"
    assert listed(first, worse[1]).chosen.spec.name == "best"
    assert listed(first, replace(worse[0], tied=False)).chosen.spec.name == "best"


# ---- the whole


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos; and no network of timm is here, nor built to know how much there is to fetch."""
    monkeypatch.setattr(timm_models, "_to_fetch", lambda found: Fetch(found.tag, tmp_path, 0))
    return make_photos(tmp_path / "photos")


def config(photos: Path) -> Config:
    return settings.load(photos, [f"output={photos.parent / 'artifacts' / 'photos'}", "seed=3"])


def test_the_sample_is_embedded_for_good_and_the_written_config_runs(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortlist, "LEAST", 10)  # so that there are two rungs
    asked = config(photos)
    found = shortlist.run(asked, 24, ["regnet_small/bundled", "pixels"])
    assert (found.images, found.of) == (24, 30)
    assert {each.spec.name for each in found.entries} == {"regnet_small-bundled-penultimate", "pixels"}
    (network,) = [each for each in found.entries if each.section]
    assert network.parameters == 2_205_480 - 385 * 200 - 4_480  # without the classifier, with norms folded
    assert found.config.read_text("utf-8").startswith(
        "# The networks that cannot be told apart from the best on 24 of 30"
    )
    survivors = settings.load(found.config)
    assert survivors.backbones == (BackboneConfig(name="regnet_small", weights="bundled"),)
    assert (survivors.output, survivors.seed) == (asked.output, 3)
    done = extract.run(survivors)
    assert done.work is not None
    assert done.work.vectors["regnet_small-bundled-penultimate"] == 36 - 24
    again = shortlist.run(asked, 24, ["regnet_small/bundled", "pixels"])
    assert [(each.spec.name, each.accuracy) for each in again.entries] == [
        (each.spec.name, each.accuracy) for each in found.entries
    ]


def test_a_photo_folder_is_enough_for_the_command(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    done = CliRunner().invoke(cli, ["shortlist", "photos", "--images", "24", "--candidates", "regnet_small,hog"])
    assert done.exit_code == 0, done.output
    assert "2 embeddings on 24 of 30 training images" in done.output


def test_candidates_that_are_not_to_be_had_are_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(BackboneError, match="2 candidates cannot be had") as caught:
        shortlist.run(config(photos), 30, ["resnet50", "regnet_small", "resnet5"])
    assert list(caught.value.problems) == [
        "candidate 'resnet50' is to fetch",
        "candidate 'resnet5' is none of those that `manyheads backbones` lists",
        "a shortlist uses only networks that are here, and fetches nothing",
    ]
    with pytest.raises(PipelineError, match="no network is left to write a config of"):
        shortlist.run(config(photos), 30, ["hog"])


def test_what_cannot_be_loaded_is_left_out(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"not it")
    result = shortlist.run(config(photos), 12, ["regnet_small", "squeezenet1_1"])
    assert [each.spec.name for each in result.entries] == ["regnet_small-bundled-penultimate"]
    (line,) = result.left_out
    assert "squeezenet1_1-b8a52dc0.pth is damaged" in line
    fetched = config(photos).model_copy(
        update={"backbones": (BackboneConfig(name="resnet50", weights="IMAGENET1K_V2"),)}
    )
    assert shortlist._candidates(fetched, [])[1] == [
        "left out: resnet50 (IMAGENET1K_V2) is not here, and a shortlist fetches nothing"
    ]


def test_all_that_is_here_and_allowed_is_a_candidate(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"")
    asked = small_config(photos, tmp_path / "out").model_copy(update={"backbones": (BackboneConfig(name="resnet18"),)})
    found, left_out = shortlist._candidates(asked, [])
    sections = [each for each in found if not isinstance(each, str)]
    assert sections[0] == asked.backbones[0]
    assert BackboneConfig(name="squeezenet1_1", weights="IMAGENET1K_V1") in sections
    assert sum(section.name == "regnet_small" for section in sections) == 2
    assert [each for each in found if isinstance(each, str)] == ["pixels", "hog"]
    assert not left_out
    found, left_out = shortlist._candidates(asked.model_copy(update={"licenses": "permissive"}), [])
    assert BackboneConfig(name="squeezenet1_1", weights="IMAGENET1K_V1") not in found
    assert left_out[0].startswith("left out: squeezenet1_1 (IMAGENET1K_V1): the licence of its weights is unknown")
