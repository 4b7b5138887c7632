"""Stage three: the best backbone trained end to end from the best linear head; its result is one more weights file.

Reads what stages one and two wrote, and the images. The training images are divided once more: one part is learned from,
the other chooses weights. Test images are used at the very end, for one paired comparison with stage two.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.model_selection import cross_val_predict

from pipeline import backbone as backbones
from pipeline import bundle as bundles
from pipeline import images, progress
from pipeline.backbone.precision import resolve_device, resolve_precision
from pipeline.backbone.weights import Network, load_network
from pipeline.config import Artifacts, BackboneConfig, Config
from pipeline.dataset import DatasetIndex
from pipeline.digests import digests_to_hex, fingerprint
from pipeline.errors import PipelineError, TrainingError
from pipeline.files import make_folder, write_text_atomic
from pipeline.heads import HEADS
from pipeline.metrics import Paired, fit_calibrator, paired_test
from pipeline.report import Leaderboard, LeaderboardRow
from pipeline.store import FeatureStore
from pipeline.training import (
    Data,
    Labelled,
    PlanStep,
    ReturnPath,
    Run,
    Task,
    Trained,
    check_plan,
    decide,
    describe,
    describe_plan,
    fold,
    predict_logits,
    put_head,
    random_layer,
    range_test,
    return_path,
    stages_of,
    train,
    write_weights,
)
from pipeline.training.averages import copy_weights
from pipeline.training.handover import Layer
from pipeline.tuning import make_folds

log = logging.getLogger(__name__)

FORMAT = "manyheads fine-tuning"
VERSION = 1

PROBES = 32
"""Stored vectors that are computed again, to see that this is the network they came from."""

TOLERANCE = 0.02
"""Their largest distance, relative to their length; bf16 on another processor stays below 0.01."""

MEMORY = 2 << 30
"""Bytes of pixels kept in memory; more go to a file beside the checkpoint."""


@dataclass(frozen=True)
class FinetuneRun:
    """What stage three wrote: `result` is result.json, `weights` the weights file."""

    result: Mapping[str, Any]
    weights: Path
    backbone: BackboneConfig
    reused: bool

    def summary_lines(self) -> list[str]:
        """The verdict, what it rests on, and how to use the weights."""
        result = self.result
        lines = ["finished before and kept"] if self.reused else []
        return [
            *lines,
            f"start      {result['start']}",
            f"validation {result['validation']['start']:.2%} at the start, {result['validation']['chosen']:.2%} chosen (alpha {result['alpha']:g}, {result['source']})",
            f"test       {result['test']['stage_two']:.2%} stage two ({result['winner']}), {result['test']['stage_three']:.2%} fine-tuned",
            f"verdict    {result['verdict']}",
            f"weights    {self.weights} ({result['bytes'] / 1e6:.1f} MB)",
            f"to use     under backbones: {{name: {self.backbone.name}, weights: {self.weights}}}, then features and heads again",
        ]


@dataclass(frozen=True)
class Choice:
    """What is fine-tuned from what: stage one's record, the linear row that is handed over (if any), the best row of all."""

    record: Mapping[str, Any]
    linear: LeaderboardRow | None
    winner: LeaderboardRow


@dataclass(frozen=True)
class Parts:
    """The rows of stage two, divided for stage three; `X` are the stored features of each part."""

    classes: tuple[str, ...]
    train: DatasetIndex
    validation: DatasetIndex
    test: DatasetIndex

    def codes(self, part: DatasetIndex) -> NDArray[np.int64]:
        """Return the place of each image's label in `classes`, shape (n,)."""
        place = {label: code for code, label in enumerate(self.classes)}
        return np.array([place[label] for label in part.labels], dtype=np.int64)


def run(config: Config) -> FinetuneRun:
    """Fine-tune the best backbone of a leaderboard and say whether it was worth it.

    Raises
    ------
    PipelineError
        When stages one and two have not been run, the embedding or head cannot be fine-tuned, or the plan is wrong.
    """
    files = Artifacts(config.output)
    choice = choose(config, files)
    store = FeatureStore.open(files.root / choice.record["store"], choice.record["fingerprint"])
    parts = divide(config, files, store)
    section = _section(config, choice.record)
    key = _key(config, choice, store, parts)
    folder = files.root / "finetuned" / f"{choice.record['name']}-{key[:8]}"
    weights = folder / f"finetuned-{key[:8]}.safetensors"
    finished = _finished(folder, key, weights)
    if finished is not None:
        return FinetuneRun(finished, weights, section, reused=True)
    make_folder(folder)
    network = load_network(section, config.seed)
    _check_identity(config, section, choice, store, parts)
    layer, start = _starting_layer(config, files, choice, store, parts)
    put_head(network.module, layer)
    task, data = _task(config, network, parts, folder)
    _announce(task, start)
    if config.finetune.training.range_test:
        found = range_test(task, data)
        log.info("range test: rate %.2g", found.suggestion)
        task = replace(task, settings=replace(task.settings, rate=found.suggestion))
    handed_over = copy_weights(task.network)
    trained = train(task, data, Run(folder, key))
    path = _path_back(config, task, data, handed_over, trained)
    description = _describe(network, parts, choice, config)
    write_weights(weights, path.weights, description, parts.train.digests)
    result = _judge(config, files, choice, parts, task, data, trained, path, start)
    document = {"format": FORMAT, "version": VERSION, "key": key, "bytes": weights.stat().st_size, **result}
    write_text_atomic(folder / "result.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    (folder / "pixels.npy").unlink(missing_ok=True)
    return FinetuneRun(document, weights, section, reused=False)


# ---- what is trained, and on what


def choose(config: Config, files: Artifacts) -> Choice:
    """Return the embedding to fine-tune and the head to start from, both by cross-validation only.

    Raises
    ------
    TrainingError
        When the leaderboard has no such embedding, or no linear head on it.
    """
    records = {record["name"]: record for record in _read(files.features, "features")["embeddings"]}
    try:
        board = Leaderboard.from_json(files.leaderboard.read_text(encoding="utf-8"))
    except OSError:
        raise PipelineError(f"{files.leaderboard}: missing; run `manyheads heads` with this config first") from None
    wanted = config.finetune
    able = [row for row in board.rows if not row.baseline and row.embedding in records]
    if wanted.embedding != "best":
        able = [row for row in able if row.embedding == wanted.embedding]
    if not able:
        names = sorted({row.embedding for row in board.rows if not row.baseline})
        raise TrainingError(
            f"finetune.embedding: {wanted.embedding!r} is not in the leaderboard; there are {', '.join(names)}"
        )
    embedding = able[0].embedding
    linear = [row for row in able if row.embedding == embedding and row.head in _linear_heads()]
    if wanted.head == "random":
        return Choice(records[embedding], None, board.best)
    if wanted.head != "best":
        linear = [row for row in linear if row.head == wanted.head]
    if not linear:
        raise TrainingError(
            f"finetune.head: {wanted.head!r} names no linear head of {embedding}; add one of {', '.join(_linear_heads())} "
            "to heads: and run `manyheads heads`, or set it to random"
        )
    return Choice(records[embedding], linear[0], board.best)


def divide(config: Config, files: Artifacts, store: FeatureStore) -> Parts:
    """Divide stage two's rows: its training rows into those learned from and those that choose.

    The data's own validation split chooses where there is one; otherwise a stratified share in which groups and copies
    stay together.
    """
    index = DatasetIndex.read(files.dataset).select("train", "validation", "test")
    usable = index.rows(~store.missing(index.digests))
    test, validation = usable.select("test"), usable.select("validation")
    rest = usable.select("train")
    if len(validation) == 0:
        folds = make_folds(
            rest.labels, max(2, round(1 / config.finetune.validation_fraction)), config.seed, rest.fold_groups()
        )
        learned, held_out = folds[0]
        rest, validation = rest.rows(learned), rest.rows(held_out)
    for name, part in (("training", rest), ("validation", validation), ("test", test)):
        if len(part) == 0:
            raise TrainingError(f"there are no {name} images with features; fine-tuning needs all three parts")
    return Parts(usable.classes, rest, validation, test)


def _linear_heads() -> tuple[str, ...]:
    return tuple(name for name, head in HEADS.items() if head.linear)


def _section(config: Config, record: Mapping[str, Any]) -> BackboneConfig:
    """The config section that makes the embedding's backbone again."""
    return BackboneConfig.model_validate(record["config"], strict=False)


def _key(config: Config, choice: Choice, store: FeatureStore, parts: Parts) -> str:
    """Name everything that determines the result."""
    return fingerprint(
        {
            "version": VERSION,
            "embedding": choice.record["fingerprint"],
            "store": store.digest,
            "rows": [digests_to_hex(part.digests) for part in (parts.train, parts.validation, parts.test)],
            "labels": [part.labels.tolist() for part in (parts.train, parts.validation, parts.test)],
            "head": None if choice.linear is None else [choice.linear.head, repr(sorted(choice.linear.params.items()))],
            "winner": choice.winner.key,
            "finetune": config.finetune.model_dump(mode="json"),
            "device": config.extraction.device,
            "seed": config.seed,
        }
    )


def _finished(folder: Path, key: str, weights: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    if not path.exists() or not weights.exists():
        return None
    document = _read(path, "finetune")
    return document if document.get("key") == key and document.get("version") == VERSION else None


def _read(path: Path, command: str) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path}: missing; run `manyheads {command}` with this config first") from None
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: cannot be read ({error}); run `manyheads {command}` again") from None
    return document


# ---- the start


def _check_identity(config: Config, section: BackboneConfig, choice: Choice, store: FeatureStore, parts: Parts) -> None:
    """See that this network gives the stored vectors, and that the layer is the one a head can follow.

    Raises
    ------
    TrainingError
        When it does not: other weights or another transform.
    """
    penultimate = section.model_copy(update={"layers": ("penultimate",), "pooling": "avg"})
    live = backbones.load(penultimate, config.extraction, config.seed)
    layer = choice.record["layer"]
    if layer not in ("penultimate", live.specs[0].layer):
        raise TrainingError(
            f"{choice.record['name']}: its head follows layer {layer!r}, only heads on the penultimate layer can become the "
            "network's last layer; set finetune.embedding to an embedding of that layer"
        )
    rows = parts.train.rows(np.arange(min(PROBES, len(parts.train))))
    stored = store.read(rows.digests)
    found = live.embed(_pixels(config, rows, live.preprocessing, None))[0]
    distance = np.linalg.norm(found - stored, axis=1) / np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
    if distance.max() > TOLERANCE:
        raise TrainingError(
            f"{choice.record['name']}: {int((distance > TOLERANCE).sum())} of {len(rows)} stored vectors differ from what the network "
            f"gives now (by up to {distance.max():.1%}); run `manyheads features` again"
        )


def _starting_layer(
    config: Config, files: Artifacts, choice: Choice, store: FeatureStore, parts: Parts
) -> tuple[Layer, str]:
    """Return the last layer to start from and a sentence that says what it is.

    The head is fitted anew, with stage two's parameters, on the images that stage three learns from: stage two's own has
    seen the validation images, on which it would look better than it is.
    """
    classes, dim = len(parts.classes), int(choice.record["dim"])
    if choice.linear is None:
        return random_layer(classes, dim, config.seed), "a random last layer"
    bundle = bundles.load(files.root / str(choice.linear.bundle))
    if bundle.classes != parts.classes:
        raise TrainingError(
            f"{choice.linear.bundle}: tells other classes apart than the data have; run `manyheads heads` again"
        )
    X, y = store.read(parts.train.digests), parts.codes(parts.train)
    pipeline = clone(bundle.estimator).fit(X, y)
    layer = fold(pipeline)
    if not hasattr(pipeline, "predict_proba"):
        layer = _tempered(layer, clone(bundle.estimator), X, y, config.seed)
    gap = choice.winner.cv_mean - choice.linear.cv_mean
    behind = "" if gap <= 0 else f", {gap:.2%} behind {choice.winner.key} in cross-validation, which has no such layer"
    return _all_classes(
        layer, pipeline.classes_, classes
    ), f"{choice.linear.head} of stage two as the last layer{behind}"


def _tempered(layer: Layer, pipeline: Any, X: NDArray[np.float32], y: NDArray[np.int64], seed: int) -> Layer:
    """Scale margins to be logits, by one temperature fitted on out-of-fold scores; no predicted label changes."""
    folds = make_folds(y, 3, seed)
    scores = cross_val_predict(pipeline, X, y, cv=[(a, b) for a, b in folds], method="decision_function")
    if scores.ndim == 1:
        scores = np.stack([-scores / 2, scores / 2], axis=1)
    slope = fit_calibrator(scores, np.unique(y, return_inverse=True)[1]).slopes[0]
    return layer[0] * slope, layer[1] * slope


def _all_classes(layer: Layer, seen: NDArray[np.int64], classes: int) -> Layer:
    """Give a class that the head never saw a row too, far below the others."""
    weights, bias = np.zeros((classes, layer[0].shape[1])), np.full(classes, layer[1].min() - 10.0)
    weights[seen], bias[seen] = layer
    return weights, bias


def _task(config: Config, network: Network, parts: Parts, folder: Path) -> tuple[Task, Data]:
    """Bring network, plan and pixels together."""
    device = resolve_device(config.extraction.device)
    _, precision, reason = resolve_precision(config.finetune.training.precision, device)
    log.info("training on %s in %s: %s", device, precision, reason)
    settings = decide(config.finetune.training, len(parts.train), precision)  # type: ignore[arg-type]
    stages = stages_of(network.module, network.preprocessing.size[0])
    plan = check_plan([PlanStep(step.start, step.scope) for step in config.finetune.unfreeze], stages)
    both = _pixels(config, _joined(parts.train, parts.validation), network.preprocessing, folder)
    split = len(parts.train)
    data = Data(
        Labelled(both[:split], parts.codes(parts.train)),
        Labelled(both[split:], parts.codes(parts.validation)),
        len(parts.classes),
        network.preprocessing.mean,
        network.preprocessing.std,
    )
    return Task(network.module, stages, plan, settings, config.seed, device), data


def _joined(first: DatasetIndex, second: DatasetIndex) -> DatasetIndex:
    return replace(
        first,
        paths=np.concatenate([first.paths, second.paths]),
        labels=np.concatenate([first.labels, second.labels]),
        splits=np.concatenate([first.splits, second.splits]),
        groups=None,
        digests=np.concatenate([first.digests, second.digests]),
        sizes=np.concatenate([first.sizes, second.sizes]),
    )


def _pixels(
    config: Config, index: DatasetIndex, preprocessing: images.Preprocessing, folder: Path | None
) -> NDArray[np.uint8]:
    """Decode and prepare images: uint8 (n, h, w, 3), in memory, or in a file of `folder` when that is too much."""
    shape = (len(index), *preprocessing.size, 3)
    in_memory = folder is None or int(np.prod(shape)) <= MEMORY
    pixels: NDArray[np.uint8] = (
        np.empty(shape, np.uint8)
        if in_memory or folder is None
        else np.lib.format.open_memmap(folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
    )
    contents = [bytes.fromhex(text) for text in digests_to_hex(index.digests)]

    def put(row: int) -> str | None:
        try:
            data = images.open_file(index.root, index.paths[row], contents[row])
            decoded = images.decode(data, max_pixels=config.dataset.max_pixels)
        except images.ImageProblem as problem:
            return f"{index.paths[row]}: {problem.reason}"
        pixels[row] = images.prepare(decoded, preprocessing)
        return None

    problems = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress.bar(len(index), "image", "reading") as bar:
        for problem in pool.map(put, range(len(index))):
            bar.update()
            if problem is not None:
                problems.append(problem)
    if problems:
        raise TrainingError(
            f"{len(problems)} of {len(index)} images that have features cannot be read now; run `manyheads features` again",
            problems[:20],
        )
    return pixels


def _announce(task: Task, start: str) -> None:
    """Say before training what will be trained, so that a wrong plan is seen while it costs nothing."""
    log.info("starting from %s", start)
    for stage in task.stages:
        log.info("  %-7s %s", stage.name, ", ".join(stage.modules))
    for line in describe_plan(task.plan, task.stages, task.network, task.settings.steps):
        log.info("%s", line)


# ---- the end


def _path_back(config: Config, task: Task, data: Data, start: dict[str, Any], trained: Trained) -> ReturnPath:
    """Take the best weights between hand-over and result; without interpolation the better of the two ends."""
    if config.finetune.interpolate:
        return return_path(task, data, start, trained.weights)
    return return_path(task, data, start, trained.weights, alphas=(0.0, 1.0))


def _describe(network: Network, parts: Parts, choice: Choice, config: Config) -> dict[str, Any]:
    prepared = network.preprocessing
    return describe(
        name=network.name,
        architecture=network.architecture,
        arguments=network.arguments,
        preprocessing={
            "resize": prepared.resize,
            "crop": prepared.crop,
            "interpolation": prepared.interpolation,
            "mean": prepared.mean,
            "std": prepared.std,
        },
        classes=parts.classes,
        contents=parts.train.digests,
        parent={"embedding": choice.record["name"], "weights_digest": network.weights_digest},
        training=config.finetune.model_dump(mode="json"),
        seed=config.seed,
    )


def _judge(
    config: Config,
    files: Artifacts,
    choice: Choice,
    parts: Parts,
    task: Task,
    data: Data,
    trained: Trained,
    path: ReturnPath,
    start: str,
) -> dict[str, Any]:
    """Compare the chosen weights with stage two's best row on the same test images, once."""
    y = parts.codes(parts.test)
    pixels = _pixels(config, parts.test, _preprocessing_of(config, choice), None)
    third = predict_logits(task.network, pixels, data.mean, data.std, task.device).argmax(1).numpy() == y
    second = _stage_two_correct(files, choice.winner, parts)
    paired = paired_test(third, second, config.seed)
    minutes = trained.seconds / 60
    return {
        "embedding": choice.record["name"],
        "start": start,
        "winner": choice.winner.key,
        "images": {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)},
        "steps": trained.steps,
        "minutes": minutes,
        "rate": task.settings.rate,
        "precision": task.settings.precision,
        "source": trained.source if path.alpha > 0 else "hand-over",
        "alpha": path.alpha,
        "curve": [[alpha, *score] for alpha, score in zip(path.alphas, path.scores, strict=True)],
        "validation": {"start": path.scores[0][0], "end": path.scores[-1][0], "chosen": max(path.scores)[0]},
        "test": {"stage_two": float(second.mean()), "stage_three": float(third.mean())},
        "gain": {"difference": paired.difference, "interval": list(paired.interval), "p_value": paired.p_value},
        "verdict": verdict(paired, minutes, len(y)),
    }


def verdict(paired: Paired, minutes: float, n_images: int) -> str:
    """Say in one sentence whether fine-tuning was worth it: worth it, not worth it, or no evidence."""
    low, high = paired.interval
    numbers = f"{paired.difference:+.2%} on {n_images:,} test images (95 % interval {low:+.2%} to {high:+.2%}) for {minutes:.1f} minutes of training"
    if low > 0:
        return f"worth it: {numbers}"
    if high < 0:
        return f"not worth it: {numbers}"
    return f"no evidence that it helps: {numbers}"


def _preprocessing_of(config: Config, choice: Choice) -> images.Preprocessing:
    return load_network(_section(config, choice.record), config.seed).preprocessing


def _stage_two_correct(files: Artifacts, winner: LeaderboardRow, parts: Parts) -> NDArray[np.bool_]:
    """Which test images stage two's best row labels right, in the order of `parts.test`."""
    bundle = bundles.load(files.root / str(winner.bundle))
    records: Sequence[Mapping[str, Any]] = _read(files.features, "features")["embeddings"]
    record = next((record for record in records if record["name"] == winner.embedding), None)
    if record is None:  # a constant guess needs no features
        X = np.zeros((len(parts.test), 1), dtype=np.float32)
    else:
        X = FeatureStore.open(files.root / record["store"], record["fingerprint"]).read(parts.test.digests)
    labels, _ = bundle.predict(X)
    return np.asarray(labels == parts.test.labels, dtype=bool)
