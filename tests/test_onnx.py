"""ONNX: one file says of an image what `predict` says, or is not written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from photos import draw_photo
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier
from sklearn.linear_model import SGDClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC

from pipeline.cli import cli
from pipeline.config import BackboneConfig, Config, ExtractionConfig
from pipeline.data.classes import Classification, MultiLabel
from pipeline.data.targets import Regression, Target
from pipeline.errors import BundleError, HeadError, PipelineError
from pipeline.evaluation.calibration import fit_calibrator, fit_sigmoids
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle, logits
from pipeline.export.exports import EXPORTS, Export
from pipeline.heads import TABLES
from pipeline.heads.head import Head, configure
from pipeline.images import Preprocessing, prepare
from pipeline.stages import export

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("skl2onnx")

from pipeline.export import onnx as models  # noqa: E402  # needs the extra
from pipeline.export.onnx import answers_differ  # noqa: E402
from pipeline.export.onnx.graph import (  # noqa: E402
    FLOAT,
    OPSET,
    UINT8,
    Graph,
    add_prepared,
)
from pipeline.export.onnx.heads import add_answer  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 6)).astype(np.float32)
NEW = RNG.normal(size=(50, 6)).astype(np.float32)
KINDS = (X[:, 0] > -0.2).astype(np.int64) + (X[:, 1] > 0)


def run(g: Graph, given: dict[str, NDArray[Any]], made: dict[str, Any]) -> dict[str, NDArray[Any]]:
    types = {np.dtype(np.uint8): UINT8, np.dtype(np.float32): FLOAT}
    inputs = {name: (types[value.dtype], [None] * value.ndim) for name, value in given.items()}
    session = onnxruntime.InferenceSession(g.model(inputs, made).SerializeToString())
    return dict(zip(made, session.run(list(made), given), strict=True))


def bundle_of(estimator: Any, target: Target, name: str = "head") -> ModelBundle:
    return ModelBundle(name, {}, target, {}, estimator, {})


def far(bundle: ModelBundle, *new: NDArray[np.float32]) -> float:
    """The largest difference between the graph and the bundle; labels are the same."""
    g, given = Graph(), {f"x{place}": vectors for place, vectors in enumerate(new)}
    found = run(g, given, add_answer(g, bundle, list(given)))
    differences, wrong, _ = answers_differ(bundle.target, *bundle.said(*new), found, 0.0)
    assert not wrong.any()
    return float(differences.max())


def unfitted(head: Head) -> Pipeline:
    """The pipeline of a head at its defaults, of few trees."""
    few = {"n_estimators": 8} if "n_estimators" in head.build(0)[-1].get_params() else {}
    return configure(head, {**head.defaults, **few}, seed=0)


def fitted(kind: str, name: str) -> ModelBundle:
    """A head of the table, with the target's calibration, fitted on few vectors."""
    head = TABLES[kind].heads[name]
    y, target = KINDS, Classification(("a", "b", "c"))
    if kind == "multilabel":
        y, target = np.stack([X[:, 0] > 0.3, X[:, 1] > 0.5], 1), MultiLabel(("a", "b"), (0.4, 0.6))
    elif kind == "regression":
        y = X[:, :2].astype(float) * 7 + 100
        target = Regression(("u", "v")).fitted(y).settled(y, y + 1)
    estimator = head.fit(unfitted(head), X, target.learned(y))
    bundle = bundle_of(estimator, target)
    if kind == "regression":
        return bundle
    _, raw, of = target.answers(estimator, X)
    if kind == "multilabel":
        return replace(bundle, calibrator=fit_sigmoids(raw, y))
    return replace(
        bundle, calibrator=fit_calibrator(logits(raw, of), y, "margins" if name == "rbf_svm" else "temperature")
    )


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table.heads])
def test_every_head_of_every_target_says_what_the_bundle_says(kind: str, name: str) -> None:
    # The votes of cosine_knn are sharp, and scikit-learn's are made of cosines in float32.
    assert far(fitted(kind, name), NEW) < (2e-5 if name == "cosine_knn" else 2e-6)


@pytest.mark.parametrize("name", ["logistic_regression", "rbf_svm"])
def test_a_label_that_all_images_have_is_said_of_every_image(name: str) -> None:
    head, y = TABLES["multilabel"].heads[name], np.stack([X[:, 0] > 0.3, np.ones(len(X), bool)], 1)
    target = MultiLabel(("a", "b"))
    assert far(bundle_of(head.fit(unfitted(head), X, target.learned(y)), target), NEW) < 2e-6


def test_two_classes_an_unseen_class_a_projection_and_no_calibration() -> None:
    for name in ("ridge", "logistic_regression", "rbf_svm", "lda", "mlp", "random_forest"):
        head = TABLES["classification"].heads[name]
        estimator = head.fit(unfitted(head), X, np.where(KINDS > 0, 2, 0))
        assert far(bundle_of(estimator, Classification(("a", "never", "c"))), NEW) < 2e-6
    scaler = StandardScaler().fit(X)
    pca = PCA(3, whiten=True).fit(scaler.transform(X))
    vectors = pca.transform(scaler.transform(X))
    last = (
        fitted("classification", "knn")
        .estimator[-1]
        .set_params(weights="uniform", metric="euclidean")
        .fit(vectors, KINDS)
    )
    estimator = Pipeline([("scaler", scaler), ("pca", pca), ("head", last)])
    assert far(bundle_of(estimator, Classification(("a", "b", "c"))), NEW) < 2e-6


def test_a_soft_vote_is_the_mean_of_its_members() -> None:
    members = tuple(fitted("classification", name) for name in ("logistic_regression", "prototypes"))
    vote = replace(members[0], estimator=None, members=members)
    assert far(vote, NEW, NEW[::-1].copy()) < 2e-6


def test_other_estimators_are_written_by_skl2onnx_or_refused_in_one_line() -> None:
    target = Classification(("a", "b", "c"))
    for model in (ExtraTreesClassifier(5, random_state=0), SGDClassifier(random_state=0)):
        assert far(bundle_of(Pipeline([("head", model.fit(X, KINDS))]), target), NEW) < 2e-6
    refused = {
        "a kernel 'poly' cannot be exported to ONNX, only rbf can": [("head", SVC(kernel="poly"))],
        "a MinMaxScaler before a head cannot be exported to ONNX": [
            ("scaler", MinMaxScaler()),
            ("head", SGDClassifier()),
        ],
        "a HistGradientBoostingClassifier cannot be written by skl2onnx": [
            ("head", HistGradientBoostingClassifier(max_iter=2))
        ],
    }
    for message, steps in refused.items():
        with pytest.raises(BundleError, match=message):
            far(bundle_of(Pipeline(steps).fit(X, KINDS), target), NEW)


WAYS = (
    Preprocessing(40, 32),
    Preprocessing(40, 32, "bicubic"),
    Preprocessing(24, 32),  # padded with black
    Preprocessing((30, 50), (28, 36), decode="standard"),
    Preprocessing(32, 32, "bicubic", fit="squash"),
    Preprocessing(40, 32, decode="standard"),
)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_images_of_any_size_are_prepared_as_predict_prepares_them(way: Preprocessing) -> None:
    g = Graph()
    g("Identity", add_prepared(g, "images", way), named="prepared")
    photo = draw_photo(np.random.default_rng(1), 133, 100)
    for size in ((133, 100), (100, 133), (1, 1), (3, 50), (32, 32)):
        pixels = np.asarray(photo.resize(size[::-1], Image.Resampling.NEAREST))
        made = run(g, {"images": pixels[None]}, {"prepared": (FLOAT, None)})["prepared"][0].transpose(1, 2, 0)
        off = np.abs(made - prepare(pixels, way))
        assert off.shape == (*way.size, 3)
        assert off.max() == 0, size


def test_an_interpolation_that_onnx_lacks_is_refused() -> None:
    with pytest.raises(
        BundleError, match="export to ONNX supports resizing by bilinear and bicubic without border, not by lanczos"
    ):
        add_prepared(Graph(), "images", Preprocessing(40, 32, "lanczos"))


def test_layers_poolings_and_cells_of_unequal_size_of_a_network() -> None:
    from pipeline.embed import backbone

    section = BackboneConfig(
        name="squeezenet1_1",
        weights="random",
        layers=("penultimate", "stage3"),
        pooling=("avg", "grid"),
        preprocessing={"resize": 72, "crop": 72},
    )
    network = backbone.load(section, ExtractionConfig(device="cpu", precision="fp32", engine="torch"), seed=0)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 72, 72, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(network.to_onnx(OPSET))
    found = session.run(None, {"pixels": pixels.transpose(0, 3, 1, 2).astype(np.float32)})
    assert [vectors.shape[1] for vectors in found] == [512, 4608, 512, 4608]
    for vectors, expected in zip(found, network.embed(pixels), strict=True):
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def exported(experiment: Config, file: Path, *more: str) -> str:
    done = CliRunner().invoke(cli, ["export", experiment.output, "--onnx", str(file), *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


ROW = "squeezenet1_1-random-penultimate/logistic_regression"


def test_the_page_on_deploying_is_as_it_says(
    experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = exported(experiment, tmp_path / "photos.onnx", "--row", ROW)
    assert re.search(
        r"proven  by onnxruntime \S+ on 6 images and 9 odd sizes: at most \S+ from `predict` on prepared", said
    )

    photo = sorted(Path(str(experiment.dataset.path)).rglob("*.png"))[-1]
    Image.open(photo).save(tmp_path / "photo.jpg", quality=95)
    page = (Path(__file__).parents[1] / "docs" / "deploying.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["label"].tolist() == [photo.parent.name]
    assert found["probabilities"].shape == (1, 3)

    about = found["session"].get_modelmeta().custom_metadata_map
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(about)
    proof, targets = json.loads(about["proof"]), json.loads(about["targets"])
    assert (proof["images"], proof["odd_sizes"], proof["allowed"]) == (6, 9, {"from_prepared": 1e-5, "from_raw": 5e-3})
    assert proof["from_prepared"] <= proof["allowed"]["from_prepared"]
    assert targets[""]["target"]["classes"] == sorted({path.parent.name for path in photo.parent.parent.rglob("*.png")})
    assert str(tmp_path) not in str(about)


def test_several_targets_share_one_network_in_one_file(experiment: Config) -> None:
    row = Artifacts(experiment.output).bundle("pixels", "logistic_regression")
    one = bundles.load(row)
    model = export.opened({"kind": one, "again": one}, False)
    assert len(model.networks.embedders) == 1
    ways = {model.networks.embedders[0].preprocessing}
    content, lines = models.write(model, export.photos(export.test_images(row), ways))
    again, _ = models.write(model, export.photos(export.test_images(row), ways))
    assert again == content, "the same model and photos are the same file"
    assert lines[1] == "output  kind_label, kind_probabilities, again_label, again_probabilities"
    session = onnxruntime.InferenceSession(content)
    found = session.run(None, {"images": np.zeros((2, 9, 7, 3), np.uint8)})
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])


def test_rounded_vectors_are_computed_in_fp32_and_proven_against_both(experiment: Config) -> None:
    place = Artifacts(experiment.output).bundle(*ROW.split("/"))
    head = bundles.load(place)
    spec = {**head.embedding["spec"], "precision": "bf16"}
    model = export.opened({"": replace(head, embedding={**head.embedding, "spec": spec})}, False)
    assert [kind.embedders[0].specs[0].precision for kind in (model.networks, model.exact)] == ["bf16", "fp32"]
    (way,) = {embedder.preprocessing for embedder in model.networks.embedders}
    some = [replace(photo, odd=False) for photo in list(export.photos(export.test_images(place), [way]))[:2]]
    content, _ = models.write(model, some)
    proof = json.loads(onnxruntime.InferenceSession(content).get_modelmeta().custom_metadata_map["proof"])
    assert (proof["images"], proof["odd_sizes"]) == (2, 0)
    assert proof["from_prepared"] <= 1e-5


def test_a_file_that_says_something_else_is_not_written(
    experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(g: Graph, bundle: ModelBundle, vectors: list[str], prefix: str = "") -> Any:
        bundle.estimator[-1].intercept_ += np.array([50.0, 0, 0])
        try:
            return add_answer(g, bundle, vectors, prefix)
        finally:
            bundle.estimator[-1].intercept_ -= np.array([50.0, 0, 0])

    monkeypatch.setattr(models, "add_answer", wrong)
    with pytest.raises(BundleError) as caught:
        export.run(Path(experiment.output), {"onnx": tmp_path / "a.onnx"}, "pixels/logistic_regression")
    assert re.fullmatch(
        r"nothing was written: from prepared pixels the file differs from `predict` for \S.*\.png: [\d.e-]+, more than 1e-05",
        str(caught.value),
    )
    assert not (tmp_path / "a.onnx").exists()


def test_what_cannot_be_exported_is_said_in_one_line(experiment: Config, tmp_path: Path) -> None:
    files, output = {"onnx": tmp_path / "a.onnx"}, Path(experiment.output)
    with pytest.raises(PipelineError, match=r"^say what to export: --onnx FILE$"):
        export.run(output, {})
    with pytest.raises(
        HeadError, match=r"--row: unknown row 'pixels/logistic', did you mean 'pixels/logistic_regression'"
    ):
        export.run(output, files, "pixels/logistic")
    with pytest.raises(BundleError, match="is the constant guess, which looks at no image"):
        export.run(Artifacts(output).bundle("majority", "most_frequent"), files)
    kind = Export(".xyz", "onnx", ("numpy", "no_such_package"), "")
    with pytest.raises(PipelineError) as caught:
        kind.require_installed()
    assert str(caught.value) == ".xyz needs no_such_package; pip install 'manyheads[onnx]'"
    assert EXPORTS["onnx"].write is models.write
