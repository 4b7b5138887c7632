"""Explain: maps that say where, exact where the head is linear, and the training images for and against."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from photos import make_photos
from PIL import Image, ImageDraw
from report_experiment import section

from pipeline import config as configuration
from pipeline.cli import cli
from pipeline.config import BackboneConfig, Config, ExtractionConfig
from pipeline.data.index import DatasetIndex
from pipeline.data.targets import Regression
from pipeline.embed import backbone
from pipeline.embed.records import EmbeddingRecord, open_record
from pipeline.embed.spec import probe_images
from pipeline.errors import ConfigError
from pipeline.experiment import Artifacts, from_plain
from pipeline.export import bundle as bundles
from pipeline.heads import as_layer
from pipeline.images import decode, prepare
from pipeline.report.explained import AGAINST, FOR, Explained, overlaid
from pipeline.report.material import gather
from pipeline.stages import explain, extract, predict, train_heads
from pipeline.stages.explain import ExplainRun

SHAPES = ("disc", "cross", "bars")
EMBEDDING = "regnet_small-bundled-penultimate"


def draw(shape: str, rng: np.random.Generator, image: Image.Image, left: int, right: int) -> None:
    """Draw a shape of any colour somewhere between two columns."""
    pen, size = ImageDraw.Draw(image), int(rng.integers(22, 29))
    x, y = int(rng.integers(left, right - size + 1)), int(rng.integers(0, 64 - size))
    colour = tuple(rng.integers(90, 255, 3).tolist())
    if shape == "disc":
        pen.ellipse((x, y, x + size, y + size), fill=colour)
    elif shape == "cross":
        pen.line((x, y, x + size, y + size), fill=colour, width=5)
        pen.line((x + size, y, x, y + size), fill=colour, width=5)
    else:
        for step in range(0, size, 6):
            pen.rectangle((x, y + step, x + size, y + step + 2), fill=colour)


def blank(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(10, 50, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An experiment on one shape in each image."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for shape in SHAPES:
        (root / "photos" / shape).mkdir(parents=True)
        for number in range(24):
            image = blank(rng)
            draw(shape, rng, image, 0, 64)
            image.save(root / "photos" / shape / f"{number:02d}.png")
    raw = {
        "output": str(root / "output"),
        "dataset": {"source": "folder", "path": str(root / "photos")},
        "backbones": [{"name": "regnet_small", "weights": "bundled", "preprocessing": {"resize": 64, "crop": 64}}],
        "baselines": ["majority"],
        "heads": ["logistic_regression", "knn"],
        "tuning": {"trials": 1, "folds": 2},
    }
    config = configuration.parse(raw, "test")
    extract.run(config)
    train_heads.run(config)
    return config


@pytest.fixture(scope="module")
def composed(shapes: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with a shape in the left half and another in the right; their names say which."""
    folder, rng = tmp_path_factory.mktemp("composed"), np.random.default_rng(1)
    for number in range(20):
        image, (left, right) = blank(rng), rng.permutation(SHAPES)[:2]
        draw(left, rng, image, 0, 32)
        draw(right, rng, image, 32, 64)
        image.save(folder / f"{left}-{right}-{number:02d}.png")
    return folder


def labelled(shapes: Config, rows: list[tuple[Path, str, str]], name: str, *heads: str, **dataset: str) -> Path:
    """Make an experiment on the same photos with other labels and splits; return its output folder."""
    output = Path(shapes.output).with_name(name)
    root = output.parent.parent
    lines = ["path,label,split", *(f"{path.relative_to(root)},{label},{split}" for path, label, split in rows)]
    output.with_suffix(".csv").write_text("\n".join(lines), encoding="utf-8")
    data = {"source": "manifest", "path": str(output.with_suffix(".csv")), "root": str(root), **dataset}
    raw = {
        **shapes.model_dump(mode="json"),
        "output": str(output),
        "dataset": data,
        "heads": list(heads),
        "baselines": [],
    }
    config = configuration.parse(raw, "test")
    extract.run(config)
    train_heads.run(config)
    return output


def explained(bundle: Path, images: list[Path], folder: Path) -> ExplainRun:
    result = predict.run(bundle, images, output=folder / "out.csv", explain=folder / "why").explained
    assert result is not None
    return result


def on_its_half(found: Explained) -> bool:
    """Whether most of what speaks for the label lies on the half that has it; of a label that no half has, it does not."""
    assert found.cells is not None
    mass = np.maximum(found.cells, 0).sum(axis=0)
    left = np.interp(len(mass) / 2, np.arange(len(mass) + 1), np.concatenate([[0], mass.cumsum()]))
    return found.label == Path(found.path).name.split("-")[0 if left > mass.sum() / 2 else 1]


# ---- maps


@pytest.mark.parametrize(
    ("head", "count", "way"), [("logistic_regression", 8, "exact class activation map"), ("knn", 4, "occlusion")]
)
def test_of_two_things_the_map_lies_on_the_one_that_is_named(
    shapes: Config, composed: Path, tmp_path: Path, head: str, count: int, way: str
) -> None:
    images = sorted(composed.iterdir())[:count]
    found = explained(Artifacts(shapes.output).bundle(EMBEDDING, head), images, tmp_path).found
    assert {each.way for each in found} == {way}
    assert np.mean([on_its_half(each) for each in found]) >= 0.9


def test_an_exact_map_is_the_lead_of_scores_whose_mean_is_the_heads(
    shapes: Config, composed: Path, tmp_path: Path
) -> None:
    folder, images = Artifacts(shapes.output).bundle(EMBEDDING, "logistic_regression"), sorted(composed.iterdir())[:3]
    found, bundle = explained(folder, images, tmp_path).found, bundles.load(folder)
    embedder, output = open_record(from_plain(EmbeddingRecord, bundle.embedding), "cpu")
    pixels = np.stack(
        [prepare(decode(image.read_bytes(), max_pixels=64 * 64), embedder.preprocessing) for image in images]
    )
    scores = bundle.estimator.decision_function(embedder.embed(pixels)[output])
    weights, bias = as_layer(bundle.estimator)
    cells = embedder.contributions(pixels, output, weights) + bias[:, None, None]
    np.testing.assert_allclose(cells.mean(axis=(2, 3)), scores, atol=1e-4)
    assert [each.label for each in found] == [bundle.classes[code] for code in scores.argmax(axis=1)]
    for each, own, code in zip(found, cells, scores.argmax(axis=1), strict=True):
        leads = [own[code] - own[other] for other in range(3) if other != code]
        np.testing.assert_allclose(each.cells, np.minimum(*leads), atol=1e-4)


def test_what_places_add_to_a_score_is_exact_for_every_pooling_of_a_map() -> None:
    asked = {"layers": ["trunk_output"], "pooling": ["avg", "max", "grid", "flatten"]}
    asked |= {"name": "regnet_small", "weights": "bundled", "preprocessing": {"resize": 64, "crop": 64}}
    live = backbone.load(BackboneConfig(**asked), ExtractionConfig(), seed=0)
    pixels, rng = probe_images((64, 64)), np.random.default_rng(0)
    assert len(live.specs) == 4
    for output, X in enumerate(live.probe):
        weights = rng.normal(size=(3, X.shape[1]))
        cells = live.contributions(pixels, output, weights)
        assert cells is not None
        assert cells.shape == (4, 3, 8, 8)
        np.testing.assert_allclose(cells.mean(axis=(2, 3)), X @ weights.T, atol=1e-4)


def test_a_map_of_one_place_tells_nothing_so_that_a_linear_head_on_it_is_explained_by_occlusion() -> None:
    asked = BackboneConfig(name="resnet18", preprocessing={"resize": 32, "crop": 32})
    live = backbone.load(asked, ExtractionConfig(), seed=0)
    assert live.contributions(probe_images((32, 32)), 0, np.ones((4, 512))) is None


def test_covering_what_decides_makes_a_label_less_likely(experiment: Config, tmp_path: Path) -> None:
    """The colour of a corner tells the class to a head on thumbnails."""
    pixels = np.full((49, 49, 3), (95, 130, 60), np.uint8)  # halfway between two classes
    pixels[:21, 28:] = (20, 190, 40)
    Image.fromarray(pixels).save(tmp_path / "corner.png")
    bundle = Artifacts(experiment.output).bundle("pixels", "logistic_regression")
    (found,) = explained(bundle, [tmp_path / "corner.png"], tmp_path).found
    assert found.cells is not None
    assert (found.label, found.cells.shape) == ("leaf", (7, 7))
    assert np.unravel_index(found.cells.argmax(), (7, 7)) == (1, 5)


def test_a_map_is_drawn_in_the_colour_of_what_it_says() -> None:
    grey = Image.new("RGB", (60, 30), (128, 128, 128))
    drawn = np.asarray(overlaid(grey, np.array([[1.0, 0.0, -1.0]])), float)
    np.testing.assert_allclose(drawn[15, 0], 0.2 * 128 + 0.8 * np.array(FOR), atol=1)
    np.testing.assert_allclose(drawn[15, 30], 128, atol=3)
    np.testing.assert_allclose(drawn[15, 59], 0.2 * 128 + 0.8 * np.array(AGAINST), atol=1)


@pytest.fixture(scope="module")
def tags(shapes: Config, composed: Path) -> Path:
    """The output folder of an experiment in which an image has the names of all its shapes."""
    rows = [(path, path.parent.name, "train") for path in sorted(Path(str(shapes.dataset.path)).rglob("*.png"))]
    for number, path in enumerate(sorted(composed.iterdir())):
        rows.append((path, "|".join(path.name.split("-")[:2]), "train" if number % 3 else "test"))
    return labelled(shapes, rows, "tags", "ridge", "knn", target="multilabel")


@pytest.mark.parametrize(
    ("head", "count", "way"), [("ridge", 4, "exact class activation map"), ("knn", 2, "occlusion")]
)
def test_of_several_labels_each_has_a_map_of_its_own(
    tags: Path, composed: Path, tmp_path: Path, head: str, count: int, way: str
) -> None:
    images = sorted(composed.iterdir())[:count]
    found = explained(Artifacts(tags).bundle(EMBEDDING, head), images, tmp_path).found
    assert {each.way for each in found} == {way}
    assert len(found) > len({each.path for each in found}) == count
    right = [on_its_half(each) for each in found if each.label in Path(each.path).name]
    assert len(right) >= count
    assert np.mean(right) >= 0.8
    for each in found:
        assert {each.label in label.split("|") for _, label, _ in each.near[0]} == {True}
        assert {each.label in label.split("|") for _, label, _ in each.near[1]} == {False}


def test_an_image_without_a_label_is_asked_about_the_likeliest() -> None:
    assert explain._codes(np.int64(2), None) == [2]
    assert explain._codes(np.array([True, False, True]), np.array([0.9, 0.1, 0.8])) == [0, 2]
    assert explain._codes(np.zeros(3, bool), np.array([0.1, 0.3, 0.2])) == [1]


# ---- neighbours and pages


def test_neighbours_are_training_images_nearest_first_and_never_the_image_itself(
    experiment: Config, tmp_path: Path
) -> None:
    files = Artifacts(experiment.output)
    index = DatasetIndex.read(files.dataset)
    taught = {str(index.root / path): label for path, label in zip(index.paths, index.labels, strict=True)}
    taught = {path: taught[path] for path in (str(index.root / each) for each in index.select("train").paths)}
    image = next(iter(taught))
    (found,) = explained(files.bundle("pixels", "logistic_regression"), [Path(image)], tmp_path).found
    speaking_for, against = found.near
    assert len(speaking_for) == len(against) == explain.NEIGHBOURS
    assert {label for _, label, _ in speaking_for} == {found.label}
    assert found.label not in {label for _, label, _ in against}
    for side in found.near:
        assert image not in {path for _, _, path in side}
        assert [label for _, label, _ in side] == [taught[path] for _, _, path in side]
        assert [away for away, _, _ in side] == sorted(away for away, _, _ in side)


def test_pages_carry_all_that_they_show_and_the_first_images_are_told(
    experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "MOST", 3)
    photos = make_photos(tmp_path / "new", per_class=2)
    (photos / "leaf" / "00.png").write_bytes(b"no image")
    bundle = Artifacts(experiment.output).bundle("pixels", "logistic_regression")
    asked = ["predict", str(bundle), str(photos), "-o", str(tmp_path / "out.csv"), "--explain", str(tmp_path / "why")]
    done = CliRunner().invoke(cli, asked)
    assert f"2 images explained, the first of 6, by occlusion: {tmp_path}/why/index.html" in done.output.splitlines()
    assert sorted(path.name for path in (tmp_path / "why").iterdir()) == ["0001.html", "0002.html", "index.html"]
    index = (tmp_path / "why" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<a href="(\d+.html)">', index) == ["0001.html", "0002.html"]
    page = (tmp_path / "why" / "0001.html").read_text(encoding="utf-8")
    assert "<h1>leaf</h1>" in page
    assert page.count('<img src="data:image/webp') == 2 + 2 * explain.NEIGHBOURS
    assert not re.search(r'src="(?!data:)', page)


def test_a_bundle_that_lies_in_no_experiment_has_no_neighbours_and_says_so(experiment: Config, tmp_path: Path) -> None:
    bundle = shutil.copytree(Artifacts(experiment.output).bundle("pixels", "logistic_regression"), tmp_path / "alone")
    result = explained(bundle, [make_photos(tmp_path / "new", per_class=1)], tmp_path)
    reason = f"no neighbours are shown: {bundle} is in no experiment with training images"
    assert result.summary_lines()[1:] == [reason]
    assert reason in (tmp_path / "why" / "0001.html").read_text(encoding="utf-8")


def test_the_page_explains_its_worst_mistakes_where_that_is_asked(shapes: Config, tmp_path: Path) -> None:
    """Of 18 test images two bear the label of another shape."""
    photos, rows = Path(str(shapes.dataset.path)), list[tuple[Path, str, str]]()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        label = "disc" if number in (0, 4) else path.parent.name
        rows.append((path, label, "train" if number % 4 else "test"))
    output = labelled(shapes, rows, "mistaken", "logistic_regression")
    shutil.move(photos, photos.with_name("elsewhere"))
    try:
        (gone,) = explain.mistakes(output)
    finally:
        shutil.move(photos.with_name("elsewhere"), photos)
    assert gone.startswith("mistakes   none explained: ")
    assert "manyheads report --explain" in section("mistakes", gather(output))
    done = CliRunner().invoke(cli, ["report", str(output), "--explain"])
    assert f"mistakes   2 images explained, by exact class activation map: {output}/mistakes/index.html" in done.output
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "manyheads report --explain" not in page
    assert re.findall(r'<a class="frame" href="(.+?)">', page) == ["mistakes/0001.html", "mistakes/0002.html"]
    assert page.count('<div class="near">') == 4


def test_other_targets_and_folders_that_cannot_be_are_refused_before_the_work(
    experiment: Config, tmp_path: Path
) -> None:
    bundle = bundles.load(Artifacts(experiment.output).bundle("pixels", "logistic_regression"))
    with pytest.raises(ConfigError, match="why an image has a label, and the target is regression"):
        explain.require({"": replace(bundle, target=Regression())}, tmp_path / "why")
    with pytest.raises(ConfigError, match="one target at a time; name the output folder of one, targets/NAME: a, b"):
        explain.require({"a": bundle, "b": bundle}, tmp_path / "why")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        explain.require({"": bundle}, tmp_path / "file")
