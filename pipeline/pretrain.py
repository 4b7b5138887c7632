"""Pretraining: a network trained from nothing on labelled images, written as a weights file; it made the bundled one.

The images are of one size and lie in `train/CLASS/` and `val/CLASS/`, in a folder or a tar archive; a `classes.tsv` beside
them may give the classes readable names. All of them are decoded once and kept in memory.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import images, progress
from pipeline.backbone.architectures import build
from pipeline.backbone.precision import resolve_device, resolve_precision
from pipeline.config import PretrainConfig
from pipeline.digests import bytes_digest, fingerprint
from pipeline.errors import TrainingError, first
from pipeline.files import make_folder, write_text_atomic
from pipeline.training import (
    Data,
    Labelled,
    PlanStep,
    Run,
    Task,
    Trained,
    check_plan,
    decide,
    describe,
    describe_plan,
    stages_of,
    train,
    write_weights,
)
from pipeline.training.averages import Weights

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
MAX_PIXELS = 1_000_000
SHOWN = 20


@dataclass(frozen=True)
class Source:
    """A labelled data set of small images: its two parts, its classes, and the digest of all of it."""

    train: Labelled
    validation: Labelled
    classes: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class PretrainRun:
    """What pretraining wrote."""

    weights: Path
    trained: Trained

    def summary_lines(self) -> list[str]:
        """The result and where it is."""
        accuracy, minutes = self.trained.score[0], self.trained.seconds / 60
        size = self.weights.stat().st_size
        return [
            f"validation {accuracy:.2%} ({self.trained.source}) after {self.trained.steps:,} steps, {minutes:.0f} minutes",
            f"weights    {self.weights} ({size / 1e6:.2f} MB) and {self.weights.with_suffix('.json').name}",
        ]


def run(config: PretrainConfig) -> PretrainRun:
    """Train a network from nothing, or go on with a run that was stopped; a usable weights file exists after each evaluation.

    Raises
    ------
    TrainingError
        When the data or the plan cannot be used.
    BackboneError
        When the architecture cannot be built.
    """
    folder = Path(config.output)
    source = read_source(Path(config.data))
    device = resolve_device("auto")
    _, precision, reason = resolve_precision(config.training.precision, device)
    log.info("training on %s in %s: %s", device, precision, reason)
    settings = decide(config.training, len(source.train), precision)  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    network = build(config.architecture, {**config.arguments, "num_classes": len(source.classes)})
    stages = stages_of(network, source.train.pixels.shape[1])
    task = Task(network, stages, check_plan([PlanStep(0, "all")], stages), settings, config.seed, device)
    for line in describe_plan(task.plan, stages, network, settings.steps):
        log.info("%s", line)
    prepared = config.preprocessing
    data = Data(source.train, source.validation, len(source.classes), prepared.mean, prepared.std)
    path = folder / "weights.safetensors"

    def ship(step: int, weights: Weights) -> None:
        _write(path, weights, config, source, {"steps": step})

    make_folder(folder)
    key = fingerprint([config.model_dump(mode="json", exclude={"output", "data", "preprocessing"}), source.digest])
    trained = train(task, data, Run(folder, key), ship)
    _write(path, trained.weights, config, source, _outcome(trained))
    return PretrainRun(path, trained)


def read_source(path: Path) -> Source:
    """Decode a folder or archive of train/CLASS/ and val/CLASS/ images into memory.

    Raises
    ------
    TrainingError
        With every problem: images that cannot be read or have another size, a split or a class that is missing.
    """
    rows: dict[str, list[tuple[str, NDArray[np.uint8]]]] = {split: [] for split in SPLITS}
    names: dict[str, str] = {}
    problems: list[str] = []
    digests: list[str] = []
    with progress.bar(0, "image", "reading") as bar:
        for name, content in sorted_files(path):
            if name.endswith("classes.tsv"):
                names = dict(line.split("\t", 1) for line in content.decode("utf-8").splitlines() if "\t" in line)
                continue
            parts = PurePosixPath(name).parts
            if len(parts) < 3 or parts[-3] not in rows:
                continue
            try:
                pixels = np.asarray(images.decode(content, max_pixels=MAX_PIXELS))
            except images.ImageProblem as problem:
                problems.append(f"{name}: {problem.reason}")
                continue
            rows[parts[-3]].append((parts[-2], pixels))
            digests.append(bytes_digest(content))
            bar.update()
    problems += _misfits(rows)
    if problems:
        raise TrainingError(
            f"{path}: {len(problems)} problems; expected train/CLASS/ and val/CLASS/ images", first(problems, SHOWN)
        )
    codes = sorted({label for label, _ in rows["train"]})
    train_part, validation = (_labelled(rows[split], codes) for split in SPLITS)
    classes = tuple(names.get(code, code) for code in codes)
    return Source(
        train_part, validation, classes if len(set(classes)) == len(codes) else tuple(codes), fingerprint(digests)
    )


def sorted_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file of a folder or a tar archive, in the order of the names.

    Raises
    ------
    TrainingError
        When there is nothing of that name, or it is no archive.
    """
    if path.is_dir():
        for file in sorted(found for found in path.rglob("*") if found.is_file()):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            contents = {
                member.name: opened.read()
                for member in archive
                if member.isfile() and (opened := archive.extractfile(member)) is not None
            }
    except (OSError, tarfile.TarError) as error:
        raise TrainingError(f"data: {path} is no folder and no tar archive ({error})") from None
    for name in sorted(contents):
        yield name, contents[name]


def _misfits(rows: Mapping[str, list[tuple[str, NDArray[np.uint8]]]]) -> list[str]:
    problems = [f"{split}: no images" for split in SPLITS if not rows[split]]
    if problems:
        return problems
    shapes = sorted({pixels.shape for split in SPLITS for _, pixels in rows[split]})
    if len(shapes) > 1:
        problems.append(f"images of {len(shapes)} sizes, such as {shapes[0][:2]} and {shapes[-1][:2]}; expected one")
    unknown = {label for label, _ in rows["val"]} - {label for label, _ in rows["train"]}
    if unknown:
        problems.append(f"val: classes that train does not have: {', '.join(sorted(unknown)[:5])}")
    return problems


def _labelled(rows: list[tuple[str, NDArray[np.uint8]]], codes: list[str]) -> Labelled:
    place = {code: number for number, code in enumerate(codes)}
    return Labelled(
        np.stack([pixels for _, pixels in rows]), np.array([place[label] for label, _ in rows], dtype=np.int64)
    )


def _outcome(trained: Trained) -> dict[str, Any]:
    return {
        "validation_accuracy": trained.score[0],
        "validation_loss": -trained.score[1],
        "averaging": trained.source,
        "steps": trained.steps,
        "seconds": round(trained.seconds),
    }


def _write(path: Path, weights: Weights, config: PretrainConfig, source: Source, outcome: dict[str, Any]) -> None:
    """Write the weights in half precision, and beside them their description as a file to read."""
    description = describe(
        name=config.name,
        architecture=config.architecture,
        arguments=config.arguments,
        preprocessing=config.preprocessing.model_dump(mode="json"),
        classes=source.classes,
        source={
            "images": {"train": len(source.train), "validation": len(source.validation)},
            "pixels": source.train.pixels.shape[1],
            "digest": source.digest,
        },
        training=config.training.model_dump(mode="json"),
        seed=config.seed,
        outcome=outcome,
    )
    write_weights(path, weights, description, half=True)
    write_text_atomic(path.with_suffix(".json"), json.dumps(description, indent=1, ensure_ascii=False) + "\n")
