"""Stage three on generated pictures: what it hands over, what it refuses, what it concludes, and that its result is a backbone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from documents import rewrite, write_index
from PIL import Image
from safetensors.torch import load_file
from scipy.special import softmax
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from pipeline import config as configuration
from pipeline.config import BackboneConfig, Config, ExtractionConfig, HeadConfig
from pipeline.data import DatasetIndex, lineage
from pipeline.data.scan import scan
from pipeline.embed import backbone
from pipeline.embed.records import EmbeddingRecord, read_records, write_records
from pipeline.embed.weights import build, load_network
from pipeline.errors import PipelineError, TrainingError
from pipeline.evaluation import ACCURACY, Paired, Predictions, paired_answers
from pipeline.evaluation.leaderboard import Leaderboard, read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.finetuning import material, trainer
from pipeline.finetuning.handover import put_head, starting_layer
from pipeline.finetuning.material import LINEAR, choose, divide, read_pixels
from pipeline.finetuning.result import judge, lines, transfer, verdict, write_weights
from pipeline.finetuning.trainer import predict_logits
from pipeline.heads import as_layer
from pipeline.heads.tuning import Projections
from pipeline.stages import finetune, train_heads
from pipeline.store import FeatureStore
from pipeline.store.writer import StoreWriter

ARCHITECTURE = "torchvision.models.regnet.RegNet"
ARGUMENTS = {
    "stem_width": 8,
    "block_params": {
        "depths": [1, 1],
        "widths": [8, 16],
        "group_widths": [8, 16],
        "bottleneck_multipliers": [1.0, 1.0],
        "strides": [1, 2],
    },
}
PREPARED = {"resize": 16, "crop": 16, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
DESCRIBED = {
    "name": "toy",
    "architecture": ARCHITECTURE,
    "arguments": ARGUMENTS,
    "preprocessing": PREPARED,
    "classes": tuple("abcde"),
}
CLASSES = ("across", "along", "checks")
STEPS = {"steps": 12, "batch_size": 16, "augment": "flip", "rate": 0.01}


def write_pictures(folder: Path, count: int = 72) -> None:
    """Stripes across, stripes along and checks, in noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:16, 0:16]
    shapes = np.stack([(y // 2) % 2, (x // 2) % 2, (x // 2 + y // 2) % 2]) * 70
    for number in range(count):
        label = number % 3
        pixels = shapes[label][..., None] + rng.integers(0, 180, (16, 16, 3))
        path = folder / CLASSES[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_toy(path: Path) -> None:
    """A small network with weights and statistics that are not the constructor's."""
    torch.manual_seed(3)
    network = build(ARCHITECTURE, {**ARGUMENTS, "num_classes": 5})
    with torch.no_grad():
        network.train()(torch.randn(64, 3, 16, 16))
    write_weights(path, network.state_dict(), **DESCRIBED)


def make_config(folder: Path, **finetuning: Any) -> Config:
    return configuration.parse(
        {
            "output": str(folder / "out"),
            "dataset": {"source": "folder", "path": str(folder / "pictures"), "test_fraction": 0.3},
            "backbones": [{"name": "toy", "weights": str(folder / "toy.safetensors")}],
            "baselines": ["majority"],
            "heads": ["logistic_regression", "ridge", "decision_tree"],
            "extraction": {"device": "cpu", "precision": "fp32"},
            "tuning": {"strategy": "random", "trials": 2, "folds": 2, "jobs": 1},
            "finetune": {**STEPS, **finetuning},
        },
        "test",
    )


def extract(config: Config) -> None:
    """Stage one, in a few lines."""
    files = Artifacts(config.output)
    index = scan(config.dataset, config.seed, files.dataset).index
    records = []
    for section in config.backbones:
        live = backbone.load(section, config.extraction, config.seed)
        vectors = live.embed(read_pixels(config, index, live.preprocessing))
        for spec, X in zip(live.specs, vectors, strict=True):
            path = files.root / "features" / f"{spec.name}.store"  # as release 0.1 laid it out
            with StoreWriter.open(path, spec.identity(), spec.dim) as writer:
                writer.append(index.digests, X)
            relative = path.relative_to(files.root).as_posix()
            digest = FeatureStore.open(path).digest
            records.append(EmbeddingRecord(spec.name, spec, relative, digest, section, config.seed))
    write_records(files.features, records, config, index.fingerprint())


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment for which stages one and two have been run."""
    folder = tmp_path_factory.mktemp("experiment")
    write_pictures(folder / "pictures")
    write_toy(folder / "toy.safetensors")
    config = make_config(folder)
    extract(config)
    train_heads.run(config)
    return folder


@pytest.fixture(scope="module")
def tuned(experiment: Path) -> finetune.FinetuneRun:
    return finetune.run(make_config(experiment, start="toy-toy-penultimate"))


def opened(config: Config) -> tuple[Any, ...]:
    files = Artifacts(config.output)
    choice = choose(config, files)
    store = FeatureStore.open(files.find_store(choice.record.store), choice.record.fingerprint)
    return files, choice, store, divide(config, files, store)


# ---- the start


@pytest.mark.parametrize("head", ["logistic_regression", "ridge"])
def test_the_network_starts_as_the_head_on_the_stored_features(experiment: Path, head: str) -> None:
    config = make_config(experiment, start=f"best/{head}")
    _, choice, store, parts = opened(config)
    layer, words = starting_layer(config, choice, store, parts)
    assert words.startswith(f"{head} of stage two (")
    network = load_network(choice.record.section, 0)
    put_head(network.module, layer)
    pixels = read_pixels(config, parts.test, network.preprocessing)
    mean, std = network.preprocessing.mean, network.preprocessing.std
    logits = predict_logits(network.module, pixels, mean, std, torch.device("cpu"))
    expected = store.read(parts.test.digests) @ layer[0].T + layer[1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.fixture(
    scope="module",
    params=[(0.9, 72), (1000, 24)],
    ids=["share", "fewer rows than components"],
)
def reduced(request: pytest.FixtureRequest, experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of the same experiment with heads on principal components, for which stages one and two have been run."""
    folder = tmp_path_factory.mktemp("reduced")
    components, count = request.param
    write_pictures(folder / "pictures", count)
    (folder / "toy.safetensors").symlink_to(experiment / "toy.safetensors")
    config = make_config(folder, steps=2)
    tuning = config.tuning.model_copy(update={"pca": components})
    config = config.model_copy(update={"tuning": tuning})
    extract(config)
    train_heads.run(config)
    return config


@pytest.mark.parametrize("head", ["logistic_regression", "ridge"])
def test_heads_on_components_are_handed_over_too(reduced: Config, head: str) -> None:
    config = reduced.model_copy(update={"finetune": reduced.finetune.model_copy(update={"start": f"best/{head}"})})
    files, choice, store, parts = opened(config)
    bundle = bundles.load(files.root / str(choice.linear.bundle))
    assert [name for name, _ in bundle.estimator.steps] == ["scaler", "pca", "head"]
    X = store.read(parts.test.digests)
    network = load_network(choice.record.section, 0)
    pixels = read_pixels(config, parts.test, network.preprocessing)
    mean, std = network.preprocessing.mean, network.preprocessing.std

    def scores(layer: Any) -> np.ndarray:
        put_head(network.module, layer)
        return predict_logits(network.module, pixels, mean, std, torch.device("cpu")).numpy().astype(np.float64)

    # Stage two's own head, and the same fitted anew on what stage three learns from.
    np.testing.assert_allclose(scores(as_layer(bundle.estimator)), bundle.estimator.decision_function(X), atol=2e-3)
    layer, _ = starting_layer(config, choice, store, parts)
    found = scores(layer)
    if head == "logistic_regression":
        first = Projections(store.read(parts.train.digests), config.tuning.pca).whole()
        steps = [("scaler", first[0].scaler), ("pca", first[0].pca), ("head", clone(bundle.estimator[-1]))]
        refitted = Pipeline(steps)
        refitted[-1].fit(first[1], parts.target.encode(parts.train))
        np.testing.assert_allclose(softmax(found, axis=1), refitted.predict_proba(X), atol=2e-3)


@pytest.mark.parametrize("head", ["logistic_regression", "ridge"])
def test_features_beyond_the_limit_stay_on_disk_and_start_the_same(
    experiment: Path, reduced: Config, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in (make_config(experiment, start=f"best/{head}"), reduced):
        _, choice, store, parts = opened(config)
        here, words = starting_layer(config, choice, store, parts)
        small = config.model_copy(update={"tuning": config.tuning.model_copy(update={"memory": "0.001MB"})})
        with monkeypatch.context() as patch:
            patch.setattr(FeatureStore, "read", None)
            disk, same = starting_layer(small, choice, store, parts)
        assert words == same
        for one, other in zip(here, disk, strict=True):
            np.testing.assert_allclose(one, other, atol=0.02 * np.abs(here[0]).max())


def test_a_head_on_components_goes_all_the_way(reduced: Config) -> None:
    made = finetune.run(reduced)
    assert made.result["start"].startswith(("logistic_regression of stage two (", "ridge of stage two ("))
    assert made.result["steps"] == 2


def test_classes_weigh_as_in_the_head_that_a_run_starts_from(experiment: Path, tmp_path: Path) -> None:
    assert not choose(make_config(experiment, start="best/ridge"), Artifacts(experiment / "out")).balanced
    assert not choose(make_config(experiment, start="random"), Artifacts(experiment / "out")).balanced
    for name in ("pictures", "toy.safetensors"):
        (tmp_path / name).symlink_to(experiment / name)
    heads = (HeadConfig(name="ridge", class_weight="balanced"),)
    config = make_config(tmp_path, steps=2).model_copy(update={"heads": heads})
    extract(config)
    train_heads.run(config)
    assert choose(config, Artifacts(config.output)).balanced
    assert finetune.run(config).result["steps"] == 2


def test_the_handed_over_head_has_not_seen_what_chooses(experiment: Path) -> None:
    _, _, _, parts = opened(make_config(experiment))
    names = [set(part.paths) for part in (parts.train, parts.validation, parts.test)]
    assert not names[0] & names[1]
    assert not (names[0] | names[1]) & names[2]
    assert len(names[1]) == pytest.approx(0.2 * len(names[0] | names[1]), abs=2)
    assert [sorted(set(part.labels)) for part in (parts.train, parts.validation)] == [list(CLASSES)] * 2


def test_the_datas_own_validation_split_chooses(experiment: Path) -> None:
    config = make_config(experiment)
    files, _, store, _ = opened(config)
    index = DatasetIndex.read(files.dataset)
    splits = index.splits.copy()
    chosen = np.flatnonzero(splits == "train")[::4]
    splits[chosen] = "validation"
    moved = experiment / "moved"
    replace(index, splits=splits).write(moved)
    parts = divide(config, replace_dataset(files, moved), store)
    assert set(parts.validation.paths) == set(index.paths[chosen])


def replace_dataset(files: Artifacts, folder: Path) -> Artifacts:
    other = Artifacts(files.root)
    other.dataset = folder
    return other


def test_a_random_start_is_spelled_out_and_has_no_head(experiment: Path) -> None:
    config = make_config(experiment, start="random")
    _, choice, store, parts = opened(config)
    assert choice.linear is None
    first, words = starting_layer(config, choice, store, parts)
    assert words == "a random last layer"
    again, _ = starting_layer(config, choice, store, parts)
    other, _ = starting_layer(config.model_copy(update={"seed": 1}), choice, store, parts)
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


# ---- the result


def test_the_result_is_never_below_the_start_on_validation(tuned: finetune.FinetuneRun) -> None:
    validation = tuned.result["validation"]
    assert validation["chosen"] >= validation["start"]
    alphas = [row[0] for row in tuned.result["curve"]]
    assert alphas == sorted({0.0, 0.25, 0.5, 0.75, 1.0, *alphas})
    assert tuned.result["alpha"] in alphas
    assert tuned.result["steps"] == 12


def test_the_weights_are_a_backbone_like_any_other(experiment: Path, tuned: finetune.FinetuneRun) -> None:
    section = BackboneConfig(name=tuned.network, weights=str(tuned.weights))
    live = backbone.load(section, ExtractionConfig(device="cpu", precision="fp32"), 0)
    assert live.specs[0].dim == 16
    assert live.specs[0].trained_on is not None
    network = load_network(section, 0)
    assert network.preprocessing.size == (16, 16)
    config = make_config(experiment)
    _, _, _, parts = opened(config)
    pixels = read_pixels(config, parts.test, network.preprocessing)
    prepared = network.preprocessing
    logits = predict_logits(network.module, pixels, prepared.mean, prepared.std, torch.device("cpu"))
    accuracy = float((logits.argmax(1).numpy() == parts.target.encode(parts.test)).mean())
    assert accuracy == tuned.result["test"]


def test_a_network_of_timm_comes_back_as_a_backbone_too(tmp_path: Path) -> None:
    """Its features through the layer that was trained say what the fine-tuned network said of the test images."""
    pytest.importorskip("timm")
    write_pictures(tmp_path / "pictures", 48)
    arguments = {"img_size": 32, "patch_size": 8}
    small = {"resize": 32, "crop": 32}
    section = BackboneConfig(name="timm:test_vit", weights="random", arguments=arguments, preprocessing=small)
    config = make_config(tmp_path, steps=4)
    config = config.model_copy(update={"backbones": (section,), "heads": config.heads[1:2]})
    extract(config)
    train_heads.run(config)
    made = finetune.run(config)
    back = BackboneConfig(name=made.network, weights=str(made.weights))
    live = backbone.load(back, ExtractionConfig(device="cpu", precision="fp32"), 0)
    _, _, _, parts = opened(config)
    (X,) = live.embed(read_pixels(config, parts.test, live.preprocessing))
    weights = load_file(made.weights)
    said = (X @ weights["head.weight"].numpy().T + weights["head.bias"].numpy()).argmax(axis=1)
    assert (said == parts.target.encode(parts.test)).mean() == made.result["test"]
    assert live.specs[0].trained_on is not None


def test_the_weights_know_what_they_have_learned_from_and_what_chose_them(
    experiment: Path, tuned: finetune.FinetuneRun
) -> None:
    _, choice, _, parts = opened(make_config(experiment))
    expected = (
        backbone.load(BackboneConfig(name="toy", weights=str(tuned.weights)), ExtractionConfig(), 0).specs[0].trained_on
    )
    known = lineage.read(tuned.weights, expected)
    for part, said in ((parts.train, (True, False)), (parts.validation, (False, True)), (parts.test, (False, False))):
        found = known.learned(part.digests), known.chose(part.digests)
        assert [(set(one.tolist()) == {wanted}) for one, wanted in zip(found, said, strict=True)] == [True, True]
    assert lineage.of(choice.record.section, choice.record.spec.trained_on) == lineage.NONE
    assert lineage.read(experiment / "toy.safetensors") == lineage.Lineage(frozenset(), None)
    with pytest.raises(TrainingError, match="was trained on other images"):
        lineage.read(experiment / "toy.safetensors", expected)
    broken = experiment / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0rubbish")
    with pytest.raises(TrainingError, match="cannot be read as a safetensors file"):
        lineage.read(broken)


def test_weights_that_are_tuned_again_keep_what_they_learned_from_before(experiment: Path) -> None:
    config = make_config(experiment)
    files, _, store, parts = opened(config)
    parent = lineage.NONE.joined(parts.validation.digests[:3], parts.train.digests[:2])
    again = divide(config, files, store, parent)
    assert list(again.validation.paths) == list(parts.validation.paths[3:])  # the three know their labels
    child = parent.joined(again.train.digests, again.validation.digests)
    assert child.learned(parts.validation.digests).tolist() == [True] * 3 + [False] * (len(parts.validation) - 3)
    assert child.chose(parts.train.digests).sum() == 2
    everything = lineage.NONE.joined(parts.validation.digests, parts.train.digests)
    with pytest.raises(TrainingError, match="there are no validation images with features"):
        divide(config, files, store, everything)


def test_test_images_choose_nothing(experiment: Path, tuned: finetune.FinetuneRun) -> None:
    """The same run with the test images' labels exchanged ends with the same weights."""
    config = make_config(experiment, start="toy-toy-penultimate")
    files = Artifacts(config.output)
    index = DatasetIndex.read(files.dataset)
    labels = index.labels.copy()
    test = np.flatnonzero(index.splits == "test")
    labels[test] = np.roll(labels[test], 1)
    try:
        write_index(files, replace(index, labels=labels))
        other = finetune.run(config)
    finally:
        write_index(files, index)
    assert other.weights != tuned.weights
    mine, theirs = load_file(tuned.weights), load_file(other.weights)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_finished_run_is_kept(experiment: Path, tuned: finetune.FinetuneRun) -> None:
    before = tuned.weights.stat().st_mtime_ns
    again = finetune.run(make_config(experiment, start="toy-toy-penultimate"))
    assert again.reused
    assert again.result == json.loads((tuned.weights.parent / "result.json").read_text())
    assert tuned.weights.stat().st_mtime_ns == before
    said = again.summary_lines()
    assert said[0] == "finished before and kept"
    assert any(line.startswith("verdict    against the best row") for line in said)
    going_on = (
        f'next step  put {{"name": "toy", "weights": "{tuned.weights}"}} under backbones: and run features and heads'
    )
    kept = "           training did not help on the validation images: the result equals the start"
    for alpha, expected in ((0.5, [True, False]), (0.0, [False, True])):
        said = replace(again, result={**again.result, "alpha": alpha}).summary_lines()
        assert [line in said for line in (going_on, kept)] == expected
    odd = replace(
        again, result={**again.result, "alpha": 0.5}, weights=Path("it's my #1: {best}.safetensors"), network="1e3"
    )
    (told,) = [line for line in odd.summary_lines() if line.startswith("next step")]
    assert yaml.safe_load(told.removeprefix("next step  put ").partition(" under backbones:")[0]) == {
        "name": "1e3",
        "weights": "it's my #1: {best}.safetensors",
    }


def test_a_stopped_run_gives_the_same_weights(
    experiment: Path, tuned: finetune.FinetuneRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped before its first evaluation, which is after four steps."""
    config = make_config(experiment, start="toy-toy-penultimate", steps=8)
    whole = finetune.run(config)
    weights = load_file(whole.weights)
    for name in ("result.json", "checkpoint.pt", whole.weights.name):
        (whole.weights.parent / name).unlink()
    real, done = trainer.train_step, []

    def stop(task: Any, data: Any, optimizer: Any, scaler: Any, step: int) -> float:
        if step == 3 and not done.count(3):
            done.append(step)
            raise KeyboardInterrupt
        done.append(step)
        return real(task, data, optimizer, scaler, step)

    monkeypatch.setattr(trainer, "train_step", stop)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(config)
    resumed = finetune.run(config)
    assert done == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert resumed.result["rate"] == whole.result["rate"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(resumed.weights).items())


@pytest.mark.parametrize(
    ("low", "high", "start"),
    [(0.01, 0.09, "worth it: +5.00%"), (-0.09, -0.01, "not worth it"), (-0.01, 0.05, "no evidence that it helps")],
)
def test_the_verdict_is_one_plain_sentence(low: float, high: float, start: str) -> None:
    sentence = verdict(
        Paired(0.05, (low, high), 0.5 if low < 0 < high else 0.01), minutes=2.34, images="372 test images"
    )
    assert sentence.startswith(start)
    assert re.search(
        r"on 372 test images \(95 % interval \S+ to \S+, p = 0\.\S+\) for 2\.3 minutes of training$", sentence
    )


def compared(tuned: np.ndarray, other: np.ndarray, units: np.ndarray | None, seed: int) -> Paired:
    """Compare which test images two networks label right."""
    a, b = (Predictions(np.ones(len(right), int), right.astype(int), units=units) for right in (tuned, other))
    return paired_answers(ACCURACY, a, b, seed)


@pytest.mark.parametrize(
    ("only_tuned", "only_other", "said"),
    [
        (4, 0, "no evidence that it helps: +4.00%"),
        (5, 0, "no evidence that it helps: +5.00%"),  # by the exact test 6 %, whatever an interval says
        (6, 0, "worth it: +6.00%"),
        (0, 5, "no evidence that it helps: -5.00%"),
        (0, 6, "not worth it: -6.00%"),
        (9, 2, "no evidence that it helps: +7.00%"),
    ],
)
def test_the_verdict_is_that_of_the_exact_test_whatever_the_seed(only_tuned: int, only_other: int, said: str) -> None:
    tuned, other = np.ones(100, dtype=bool), np.ones(100, dtype=bool)
    other[:only_tuned], tuned[50 : 50 + only_other] = False, False
    sentences = {verdict(compared(tuned, other, None, seed), 1.0, "100 test images") for seed in range(5)}
    assert len(sentences) == 1
    assert sentences.pop().startswith(f"{said} on 100 test images (95 % interval ")


def test_the_verdict_counts_groups_and_not_their_images() -> None:
    """Thirty more right of 300 are evidence where images are independent, and none when they are one group of ten."""
    tuned, other = np.ones(300, dtype=bool), np.ones(300, dtype=bool)
    other[:30] = False
    assert compared(tuned, other, None, 0).shown == 1
    assert compared(tuned, other, np.arange(300) // 30, 0).shown == 0
    assert compared(tuned, other, np.arange(300) // 3, 0).shown == 1


def test_the_verdict_compares_with_the_best_row_and_with_the_same_network_frozen(experiment: Path) -> None:
    config = make_config(experiment, start="best/ridge")
    files, choice, _, parts = opened(config)
    others = [row for row in board_of(files).rows if row.key not in (choice.frozen.key, "majority/most_frequent")]
    assert (choice.linear, choice.frozen.key) == (choice.frozen, "toy-toy-penultimate/ridge")
    choice = replace(choice, winner=others[0])
    right = parts.target.encode(parts.test)
    found = judge(files, choice, parts, right, 1.5, 0)
    assert found["test"] == 1.0
    assert {name: one["row"] for name, one in found["comparisons"].items()} == {
        "best": others[0].key,
        "frozen": "toy-toy-penultimate/ridge",
    }
    for one, row in zip(found["comparisons"].values(), (others[0], choice.frozen), strict=True):
        assert one["test"] == row.test.accuracy
        assert one["gain"]["difference"] == pytest.approx(1 - row.test.accuracy)
    result = {**found, "start": "", "alpha": 1, "validation": {"chosen": 1, "start": 1}}
    verdicts = [line for line in lines(result) if " against the " in line]
    assert verdicts[0].startswith(f"verdict    against the best row, {others[0].key} ({others[0].test.accuracy:.2%}): ")
    assert verdicts[1].startswith("           against the same network frozen, toy-toy-penultimate/ridge (")
    same = judge(files, replace(choice, winner=choice.frozen), parts, right, 1.5, 0)
    verdicts = [line for line in lines({**result, **same}) if " against the " in line]
    assert len(verdicts) == 1
    assert "against the best row, which is the same network frozen, toy-toy-penultimate/ridge (" in verdicts[0]
    assert lines({**result, **same})[-1].startswith(
        "transfer   pretraining helps: toy-toy-penultimate/ridge (100.00%) against majority/most_frequent (33.33%), the best without "
        "any, +66.67% on 21 test images (95 % interval "
    )
    held_out = transfer(files, choice, 0, held_out=True)
    assert " any, " in held_out
    assert f"on {len(parts.train) + len(parts.validation)} training images" in held_out
    assert transfer(files, replace(choice, floor=None), 0) == ""
    assert transfer(files, replace(choice, frozen=replace(choice.frozen, untrained=True)), 0) == ""
    swapped = replace(choice, frozen=choice.floor, floor=choice.frozen)
    assert transfer(files, swapped, 0).startswith("negative transfer: majority/most_frequent (33.33%) against ")
    random = choose(make_config(experiment, start="random"), files)
    assert (random.linear, random.frozen.embedding, random.frozen.head in LINEAR) == (None, "toy-toy-penultimate", True)


def board_of(files: Artifacts) -> Leaderboard:
    return read_leaderboard(files.root)


# ---- what is refused


def test_stages_one_and_two_come_first(tmp_path: Path, experiment: Path) -> None:
    write_pictures(tmp_path / "pictures", 12)
    write_toy(tmp_path / "toy.safetensors")
    config = make_config(tmp_path)
    with pytest.raises(PipelineError, match=r"features\.json: missing; run `manyheads features`"):
        finetune.run(config)
    extract(config)
    with pytest.raises(PipelineError, match=r"leaderboard\.json: missing; run `manyheads heads`"):
        finetune.run(config)


def test_a_target_of_a_kind_that_is_not_served_is_refused(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material, "SERVED", "regression")
    with pytest.raises(
        TrainingError, match="finetune supports only regression targets, but the target is classification"
    ):
        finetune.run(make_config(experiment))


def test_names_that_are_not_there_are_told_with_those_that_are(experiment: Path) -> None:
    with pytest.raises(
        TrainingError, match="'other' is not a backbone's embedding on the leaderboard; there are toy-toy-penultimate"
    ):
        finetune.run(make_config(experiment, start="other"))
    with pytest.raises(
        TrainingError,
        match="has no linear head 'decision_tree'; add one of ridge, logistic_regression, lda, linear_svm",
    ):
        finetune.run(make_config(experiment, start="best/decision_tree"))
    with pytest.raises(TrainingError, match="the network has no stage 'layer4'") as error:
        finetune.run(make_config(experiment, unfreeze=[[0, "layer4"]]))
    assert "stem, stage1, stage2" in str(error.value)


def test_other_weights_under_the_same_name_are_noticed(experiment: Path) -> None:
    config = make_config(experiment, steps=3)
    path = experiment / "toy.safetensors"
    original = path.read_bytes()
    torch.manual_seed(9)
    network = build(ARCHITECTURE, {**ARGUMENTS, "num_classes": 5})
    try:
        write_weights(path, network.state_dict(), **DESCRIBED)
        with pytest.raises(PipelineError, match="this machine computes another embedding than the stored one"):
            finetune.run(config)
    finally:
        path.write_bytes(original)


def test_stored_vectors_of_another_transform_are_noticed(experiment: Path) -> None:
    config = make_config(experiment, steps=3)
    files, choice, _, _ = opened(config)
    spec = choice.record.spec
    path = files.root / "features" / "wrong.store"
    with StoreWriter.open(path, spec.identity(), spec.dim) as writer:
        rng = np.random.default_rng(0)
        index = DatasetIndex.read(files.dataset)
        writer.append(index.digests, rng.normal(size=(len(index), spec.dim)).astype(np.float32))
    wrong = replace(choice.record, store="features/wrong.store", digest=FeatureStore.open(path).digest)
    before = read_records(files.features)
    try:
        write_records(files.features, [wrong], config, index.fingerprint())
        with pytest.raises(
            TrainingError, match="32 of 32 stored vectors are not the inputs of the network's last layer"
        ):
            finetune.run(config)
    finally:
        write_records(files.features, before, config, index.fingerprint())


def test_heads_on_vectors_that_do_not_enter_the_last_layer_are_not_handed_over(tmp_path: Path) -> None:
    """Largest values in place of means: as many, and of the same network."""
    write_pictures(tmp_path / "pictures", 36)
    write_toy(tmp_path / "toy.safetensors")
    section = BackboneConfig(
        name="toy", weights=str(tmp_path / "toy.safetensors"), layers=("trunk_output",), pooling="max"
    )
    config = make_config(tmp_path).model_copy(update={"backbones": (section,)})
    extract(config)
    train_heads.run(config)
    with pytest.raises(
        TrainingError, match="stored vectors are not the inputs of the network's last layer; only heads"
    ):
        finetune.run(config)


def test_a_leaderboard_of_another_config_is_refused(experiment: Path) -> None:
    config = make_config(experiment)
    path = Artifacts(config.output).leaderboard
    before = path.read_text(encoding="utf-8")
    document = json.loads(before)
    document["provenance"]["config"]["seed"] += 1
    document["provenance"]["config"]["backbones"] = [{"name": "resnet18"}]
    try:
        rewrite(path, document)
        with pytest.raises(PipelineError) as error:
            finetune.run(config)
    finally:
        path.write_text(before, encoding="utf-8")
    assert str(error.value).splitlines()[:2] == [
        f"{path}: is of another config; run `manyheads heads` with this config first",
        f"  seed: the leaderboard has {config.seed + 1}, this config has {config.seed}",
    ]
    assert str(error.value).splitlines()[2].startswith("  backbones: not name: toy")


def test_images_that_are_gone_are_named(experiment: Path) -> None:
    config = make_config(experiment, steps=3)
    _, _, _, parts = opened(config)
    gone = parts.train.root / parts.train.paths[0]
    content = gone.read_bytes()
    gone.write_bytes(content + b" ")
    try:
        with pytest.raises(TrainingError, match="images that have features cannot be read now") as error:
            finetune.run(config)
    finally:
        gone.write_bytes(content)
    assert error.value.problems == (f"{parts.train.paths[0]}: it changed after the scan; run again",)
