"""scikit-learn citizens: the Embedder in pipelines, saved heads as estimators, and what its own checks say of them."""

from __future__ import annotations

import os
import pickle
import re
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from pipeline.config import Config
from pipeline.data.classes import Classification, MultiLabel
from pipeline.data.targets import Regression
from pipeline.embed import transformer
from pipeline.embed.transformer import Embedder
from pipeline.errors import BackboneError, BundleError, ConfigError, DatasetError
from pipeline.experiment import Artifacts
from pipeline.export.bundle import ModelBundle
from pipeline.export.estimators import HeadClassifier, HeadRegressor
from pipeline.images import HASH_STORE
from pipeline.stages.estimators import Classifier, Regressor, best_estimator
from pipeline.stages.load import load
from pipeline.store import FeatureStore
from pipeline.store.writer import StoreWriter

BACKBONE = "squeezenet1_1-random-penultimate"
SMALL = {"weights": "random", "preprocessing": {"resize": 32, "crop": 32}}


def small(**more: Any) -> Embedder:
    return Embedder("squeezenet1_1", **{**SMALL, **more})


@pytest.fixture(scope="module")
def photos(experiment: Config) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paths, labels, and the vectors that `features` made of them, float32 of shape (36, 512)."""
    X, y, paths, _ = load(experiment.output, embedding=BACKBONE)
    return [os.path.join(str(experiment.dataset.path), path) for path in paths], y, np.asarray(X)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_store(folder: Path, name: str = "squeezenet1_1") -> FeatureStore:
    (path,) = folder.glob(f"{name}*.store")
    return FeatureStore.open(path)


# ---- the Embedder


def test_vectors_are_those_of_features_bit_for_bit_from_paths_and_from_pixels(photos, here: Path) -> None:
    paths, _, vectors = photos
    embedder = small()
    assert np.array_equal(embedder.transform(paths), vectors)
    store = only_store(here / "artifacts" / "features")
    assert (store.rows, store.generation) == (36, 2)  # an empty one, and one with all of them
    assert FeatureStore.open(here / "artifacts" / "features" / HASH_STORE).rows == 36
    opened = [Image.open(path) for path in paths]
    for images in (opened, np.stack(opened), pd.Series(paths), pd.DataFrame({"path": paths}), map(Path, paths)):
        assert np.array_equal(small(store=None).transform(images), vectors)
    assert np.array_equal(embedder.transform(paths[3]), vectors[3:4])
    np.testing.assert_allclose(small(store=None).transform(opened[3]), vectors[3:4], rtol=1e-5, atol=1e-5)
    assert only_store(here / "artifacts" / "features").generation == 2


def test_the_store_of_an_experiment_is_found_and_nothing_is_embedded(experiment: Config, photos) -> None:
    paths, _, vectors = photos
    stores = Artifacts(experiment.output).stores
    before = only_store(stores).digest
    assert np.array_equal(small(store=stores).transform(paths[::-1]), vectors[::-1])
    assert only_store(stores).digest == before


def test_each_image_is_embedded_once_in_whatever_fold(photos, here: Path) -> None:
    paths, y, _ = photos
    pipeline = make_pipeline(small(store="kept"), NearestCentroid())
    assert cross_val_score(pipeline, paths, y, cv=3).mean() > 0.9
    after_folds = only_store(here / "kept")
    assert (after_folds.rows, after_folds.generation) == (36, 3)  # training and test images of the first fold
    search = GridSearchCV(pipeline, {"embedder__layer": ["penultimate", "stage2"]}, cv=2).fit(paths, y)
    assert search.best_estimator_[0].layer in ("penultimate", "stage2")
    again = FeatureStore.open(after_folds.path)
    assert again.generation == 3
    assert {path.name.rpartition("-")[0] for path in (here / "kept").glob("squeezenet1_1*")} == {
        BACKBONE,
        "squeezenet1_1-random-stage2",
    }
    columns = {path.stem for path in (here / "kept").glob("*.json")}
    assert columns == {"specs"}


def test_pixels_have_a_content_of_their_own_by_their_pixels(here: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (40, 50, 3), dtype=np.uint8) for _ in range(3)]
    embedder = Embedder("pixels", store="kept")
    first = embedder.transform([arrays[0], arrays[1], arrays[0]])
    assert np.array_equal(first[0], first[2])
    assert only_store(here / "kept", "pixels").rows == 2
    assert np.array_equal(embedder.transform(arrays[0].reshape(1, 40, 50, 3)), first[:1])
    assert not np.array_equal(embedder.transform(arrays[0].reshape(50, 40, 3)), first[:1])
    assert only_store(here / "kept", "pixels").rows == 3


def test_a_member_of_an_archive_is_the_file_that_it_holds(photos, here: Path) -> None:
    paths = photos[0][:2]
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for number, path in enumerate(paths):
            archive.write(path, f"{number}.png")
    embedder = Embedder("pixels", store="kept")
    vectors = embedder.transform(paths)
    assert np.array_equal(embedder.transform(["photos.zip/0.png", here / "photos.zip" / "1.png"]), vectors)
    assert only_store(here / "kept", "pixels").rows == 2


def test_odd_pixels_are_read_by_the_policy_of_files(here: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (40, 40), dtype=np.uint8)
    clear = np.dstack([grey, grey, grey, np.zeros_like(grey)])
    turned = Image.fromarray(np.dstack([grey] * 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save("turned.jpg", exif=exif, quality=95)
    Image.fromarray(grey.astype(np.uint16) * 257).save("deep.png")
    Image.fromarray(clear, "RGBA").quantize().save("palette.png")
    embedder = Embedder("pixels", store=None)
    for name in ("turned.jpg", "deep.png", "palette.png"):
        assert np.array_equal(embedder.transform(Image.open(name)), embedder.transform(name)), name
    one = embedder.transform(grey)
    assert np.array_equal(embedder.transform([grey[..., None], np.dstack([grey] * 3)]), np.repeat(one, 2, axis=0))
    assert (embedder.transform(clear) == 1).all()


def test_images_that_cannot_be_used_are_named_all_at_once(photos, here: Path) -> None:
    good = photos[0][0]
    Path("broken.jpg").write_bytes(b"nothing")
    Path("folder").mkdir()
    bad = ["gone.jpg", good, "broken.jpg", "folder", Image.new("F", (9, 9)), "broken.jpg"]
    for store in ("kept", None):
        with pytest.raises(DatasetError) as caught:
            Embedder("hog", store=store).transform(bad)
        assert caught.value.message == "5 of 6 images cannot be used; repair or omit them"
        starts = ["gone.jpg: it cannot be read: No such", "broken.jpg: it is not an image", "folder: it is", "image 4: it has 32-bit, floating", "broken.jpg: it is not an image"]  # fmt: skip
        for problem, start in zip(caught.value.problems, starts, strict=True):
            assert problem.startswith(start)
    assert only_store(here / "kept", "hog").rows == 1  # the good one is not embedded again


@pytest.mark.parametrize(
    ("images", "got"),
    [
        ([], "no images (0 samples)"),
        (3, "a int"),
        ([None], "a NoneType"),
        (np.zeros((2, 40, 40, 3)), "a ndarray of float64, shape (40, 40, 3)"),
        (np.zeros((3, 40, 40, 2), np.uint8), "a ndarray of uint8, shape (40, 40, 2)"),
    ],
)
def test_what_is_no_image_is_told(images: object, got: str) -> None:
    with pytest.raises(
        DatasetError, match="^" + re.escape(f"got {got}; expected a path, a PIL image or a uint8 array")
    ):
        Embedder("pixels", store=None).transform(images)


def test_wrong_parameters_are_told_all_at_once_when_it_is_fitted() -> None:
    with pytest.raises(ConfigError) as caught:
        Embedder(layer=3, precision="fp8", pooling="mean").fit(["a.jpg"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "backbones.0.layers.0",
        "backbones.0.pooling.0",
        "extraction.precision",
    ]
    with pytest.raises(BackboneError, match=r"resnet50 has several weights; choose.*IMAGENET1K_V1, IMAGENET1K_V2"):
        Embedder("resnet50").fit()
    with pytest.raises(BackboneError, match="no network 'resnet81', did you mean 'resnet18'"):
        Embedder("resnet81").fit()


def test_it_is_cloned_and_pickled_as_its_parameters_alone(photos, here: Path) -> None:
    paths, _, vectors = photos
    embedder = clone(small(store=None)).set_params(layer="penultimate")
    assert embedder.get_params()["weights"] == "random"
    embedder.transform(paths[:2])
    data = pickle.dumps(embedder)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).transform(paths), vectors)
    assert set(vars(embedder)) == set(embedder.get_params())


def test_columns_have_names_and_pandas_is_given_where_asked(photos, here: Path) -> None:
    paths = pd.Series(photos[0][:4], index=[7, 5, 3, 1])
    table = small(store="kept").set_output(transform="pandas").transform(paths)
    assert table.columns[[0, -1]].tolist() == ["squeezenet1_1_0", "squeezenet1_1_511"]
    assert table.index.tolist() == [7, 5, 3, 1]
    union = FeatureUnion([("net", small(store="kept")), ("hog", Embedder("hog", store="kept"))])
    assert union.get_feature_names_out()[[0, -1]].tolist() == ["net__squeezenet1_1_0", "hog__hog_1763"]


def test_vectors_of_another_identity_than_the_head_was_fitted_on_are_refused(photos, here: Path) -> None:
    embedder = small(store=None, seed=1, fingerprint=small(store=None)._spec().fingerprint())
    with pytest.raises(BackboneError, match="its vectors differ from those of the head"):
        embedder.transform(photos[0][:1])


def test_a_second_writer_waits_for_the_first_and_embeds_only_what_is_left(photos, here: Path) -> None:
    paths = photos[0]
    embedder = small(store="kept")
    spec = embedder._spec()
    path = Artifacts("kept", "kept").store(spec.name, spec.fingerprint())
    found = []
    with StoreWriter.open(path, spec.identity(), spec.dim):
        waiting = threading.Thread(target=lambda: found.append(embedder.transform(paths[:3])))
        waiting.start()
    waiting.join()
    assert np.array_equal(found[0], embedder.transform(paths[:3]))


def test_what_is_in_the_store_needs_no_network(experiment: Config, photos, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _, vectors = photos
    embedder = small(store=Artifacts(experiment.output).stores)
    embedder.transform(paths[:1])  # the folder knows the embedding from now on
    monkeypatch.setattr(transformer, "_loaded", lambda *_: pytest.fail("the network is loaded"))
    assert np.array_equal(embedder.transform(paths), vectors)
    assert len(embedder.get_feature_names_out()) == 512


# ---- saved heads


def test_the_best_of_an_experiment_is_a_pipeline_that_can_be_fitted_again(experiment: Config, photos) -> None:
    paths, y, vectors = photos
    best = best_estimator(experiment.output)
    assert isinstance(best, Pipeline)
    assert best.classes_.tolist() == sorted(set(y))
    assert best.score(paths, y) > 0.9
    stores = Artifacts(experiment.output).stores
    before = only_store(stores).digest
    alone = best_estimator(Artifacts(experiment.output).bundle(BACKBONE, "logistic_regression"), store=stores)
    own = alone[-1].bundle.estimator
    assert cross_val_score(alone, paths, y, cv=2).tolist() == cross_val_score(own, vectors, y, cv=2).tolist()
    assert only_store(stores).digest == before
    other = clone(alone).fit(paths, y == "leaf")
    assert other.predict(paths[:1]).dtype == bool
    np.testing.assert_allclose(other.predict_proba(paths).sum(axis=1), 1, rtol=1e-6)


def test_a_classifier_says_what_predict_writes_and_keeps_nothing(experiment: Config, photos, here: Path) -> None:
    from pipeline.stages import predict

    paths = photos[0]
    predict.run(Path(experiment.output), [Path(path) for path in paths], output=here / "said.csv")
    said = pd.read_csv("said.csv")
    loaded = Classifier.load(experiment.output)
    probabilities = loaded.predict_proba(paths)
    assert loaded.predict(paths).tolist() == said["label"].tolist()
    assert np.array_equal(probabilities.max(axis=1).round(6), said["probability"])
    assert loaded.classes_[probabilities.argmax(axis=1)].tolist() == said["label"].tolist()
    one = loaded.predict_proba(Image.open(paths[5]))
    np.testing.assert_allclose(one, probabilities[5:6], rtol=1e-3, atol=1e-6)
    again = pickle.loads(pickle.dumps(loaded))
    assert np.array_equal(again.predict_proba(paths), probabilities)
    assert [path.name for path in here.iterdir()] == ["said.csv"]


def test_what_a_folder_does_not_hold_is_told(experiment: Config, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"predicts classes; use Classifier\.load"):
        Regressor.load(experiment.output)
    with pytest.raises(BundleError, match=r"bundle\.json: missing; expected an experiment"):
        Classifier.load(tmp_path)
    guess = Artifacts(experiment.output).bundle("majority", "most_frequent")
    with pytest.raises(BundleError, match="is the constant guess, which looks at no image"):
        Classifier.load(guess)


# ---- scikit-learn's own checks


def head(kind: type, target: Any, estimator: Any) -> Any:
    embedding = {"name": "two numbers", "spec": {"dim": 2}}
    return kind(ModelBundle("linear", {}, target, embedding, make_pipeline(StandardScaler(), estimator), {}))


@pytest.mark.parametrize(
    "estimator",
    [
        head(HeadClassifier, Classification(("a", "b")), LogisticRegression()),
        head(HeadRegressor, Regression(), Ridge()),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_saved_heads_pass_all_checks(estimator: Any) -> None:
    rounded = {"check_methods_sample_order_invariance": "vectors are float32, and it allows a difference of 1e-9"}
    results = check_estimator(estimator, expected_failed_checks=rounded, on_skip=None)
    assert {found["status"] for found in results} <= {"passed", "skipped", "xfail"}
    assert sum(found["status"] == "passed" for found in results) > 45


def test_several_labels_are_columns_of_0_and_1_and_can_be_fitted_again() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 2)).astype(np.float32)
    y = (X > 0).astype(int)
    fitted = head(HeadClassifier, MultiLabel(("right", "up"), (0.1, 0.9)), KNeighborsClassifier()).fit(X, y)
    assert fitted.classes_.tolist() == ["right", "up"]
    assert (fitted.predict(X) == y).mean() > 0.9
    assert np.array_equal(fitted.predict(X), fitted.predict_proba(X) >= 0.5)


NUMBERS = "X is images, not numbers"
FAILED = dict.fromkeys(
    (
        "check_complex_data",
        "check_dict_unchanged",
        "check_dont_overwrite_parameters",
        "check_dtype_object",
        "check_estimators_dtypes",
        "check_estimators_pickle",
        "check_f_contiguous_array_estimator",
        "check_fit2d_1feature",
        "check_fit2d_1sample",
        "check_fit2d_predict1d",
        "check_fit_idempotent",
        "check_fit_score_takes_y",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_pipeline_consistency",
        "check_transformer_data_not_an_array",
        "check_transformer_general",
        "check_transformers_unfitted_stateless",
    ),
    NUMBERS,
) | dict.fromkeys(
    (
        "check_estimator_sparse_array",
        "check_estimator_sparse_tag",
        "check_estimators_empty_data_messages",
        "check_estimators_nan_inf",
        "check_fit1d",
        "check_n_features_in",
        "check_n_features_in_after_fitting",
    ),
    "images are looked at by transform alone, and have no number of features",
)


@pytest.mark.filterwarnings("ignore")
def test_the_embedder_passes_every_check_that_needs_no_numbers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn checks nothing of what takes no numbers; said to take them, it fails where it is given some."""
    tags = Embedder.__sklearn_tags__

    def as_if_of_numbers(self: Embedder) -> Any:
        found = tags(self)
        found.input_tags.two_d_array = True
        return found

    monkeypatch.setattr(Embedder, "__sklearn_tags__", as_if_of_numbers)
    results = check_estimator(Embedder("pixels"), expected_failed_checks=FAILED, on_skip=None, on_fail=None)
    of = {status: {found["check_name"] for found in results if found["status"] == status} for status in ("passed", "failed", "xfail")}  # fmt: skip
    assert of["failed"] == set()
    assert of["xfail"] == FAILED.keys()
    assert len(of["passed"]) >= 15
    assert Embedder().store == transformer.STORE
