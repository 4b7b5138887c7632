"""Stage two: tuned heads on the stored features, compared on the same folds and the same test images.

Reads what stage one wrote (the index and the feature stores), needs neither the images nor torch, and writes a bundle per
head and the leaderboard. The best head is chosen by cross-validation; test images choose nothing.

    task.py         the rows, the folds, the test images
    place.py        features in memory or on disk, and the heads that are left out where neither will do
    predictions.py  what a head said of every image
    leaks.py        near-duplicates across test or folds, and the scores without them
    repeats.py      searches within outer folds and with other seeds, on request; class weights switched
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline

from pipeline import heads as head_table
from pipeline.config import Config, TuningConfig, dump_yaml
from pipeline.data import DatasetIndex
from pipeline.embed.records import EmbeddingRecord, read_asked_records, require_index
from pipeline.errors import BundleError, HeadError, UnfittedError
from pipeline.evaluation import METRICS, Predictions, scores
from pipeline.evaluation.expected import expected_accuracy
from pipeline.evaluation.intervals import Interval
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, judge
from pipeline.evaluation.leaderboard.imbalance import advice
from pipeline.evaluation.leaderboard.rows import CONSTANT_GUESS
from pipeline.experiment import Artifacts, bundle_file
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.heads import LOGISTIC_REGRESSION, Head
from pipeline.heads.tuning import TuningRun, check, limited, require, tune
from pipeline.io.digests import fingerprint
from pipeline.io.files import write_text_atomic
from pipeline.stages.train_heads import repeats
from pipeline.stages.train_heads.leaks import find_leaks
from pipeline.stages.train_heads.place import Embedded, place_of, predict
from pipeline.stages.train_heads.predictions import calibrator_of, predictions_of
from pipeline.stages.train_heads.task import Task, make_task, unseen_task
from pipeline.store import FeatureStore

__all__ = ["HeadsRun", "Task", "make_task", "run"]

log = logging.getLogger(__name__)

BASELINE_HEAD = LOGISTIC_REGRESSION
"""What the pixels and HOG baselines are classified with."""

ROW_VERSION = 5
"""Goes up when a row or a bundle changes its meaning, so that finished ones are made again."""


@dataclass(frozen=True)
class HeadsRun:
    """What stage two wrote."""

    leaderboard: Leaderboard
    files: Artifacts
    reused: int
    """Heads that were finished before and not tuned again."""

    def summary_lines(self) -> list[str]:
        """The leaderboard and where everything is."""
        best, verdict = self.leaderboard.best, self.leaderboard.verdict
        lines = [self.leaderboard.to_text(), ""]
        if self.reused:
            lines.append(f"{self.reused} of {len(self.leaderboard.rows)} rows were finished before and kept.")
        lines += [
            f"leaderboard  {self.files.leaderboard_md} and {self.files.leaderboard.name}",
            f"best head    {self.files.root / best.bundle}"
            if best.bundle
            else "best head    none: a constant guess won",
            f"to predict   manyheads predict {quote(str(self.files.root))} IMAGES --output labels.csv{self._trust(best)}",
        ]
        chosen = self.leaderboard.row(verdict.recommended) if verdict else best
        if chosen.key != best.key and chosen.bundle and chosen.embedding != CONSTANT_GUESS:
            lines.append(f"recommended  {self.files.root / chosen.bundle}")
        return lines

    def _trust(self, row: LeaderboardRow) -> str:
        runs_code = row.bundle and bundles.describe(self.files.root / row.bundle).get("runs_code_when_loaded")
        return " --trust" if runs_code else ""


@dataclass(frozen=True)
class Entry:
    """One row to make: a head on an embedding; no embedding for the guess that looks at no image."""

    record: EmbeddingRecord | None
    head: Head
    tuning: TuningConfig

    @property
    def name(self) -> str:
        """The embedding's name."""
        return CONSTANT_GUESS if self.record is None else self.record.name


def run(config: Config) -> HeadsRun:
    """Tune every head on every embedding and rank them.

    Raises
    ------
    PipelineError
        When stage one has not been run for this config, the data cannot be cross-validated, or a head is wrong.
    """
    files = Artifacts(config.output)
    heads = head_table.resolve_all(config.heads)
    require(config.tuning.strategy)
    records = read_asked_records(files.features, config)
    require_index(files.features, DatasetIndex.read(files.dataset).fingerprint())
    stores = {record.name: FeatureStore.open(files.root / record.store, record.fingerprint) for record in records}
    task = make_task(config, files, list(stores.values()))
    rows: list[LeaderboardRow] = []
    reused = 0
    tasks = {record.name: unseen_task(task, record, config) for record in records}
    tuning = limited(config.tuning)
    places = {name: place_of(name, store.dim, tasks[name], tuning) for name, store in stores.items()}
    held: tuple[str, Embedded] | None = None
    notes, left_out = [place.sentence() for place in places.values() if place.on_disk], list[str]()
    notes += advice(np.bincount(task.y_train, minlength=len(task.classes)).tolist(), task.classes, tuning.scoring)
    for entry in _entries(config, records, heads, tuning, task):
        own, place = tasks.get(entry.name, task), places.get(entry.name)
        key = _key(entry, own, config.seed)
        row = _finished(files.bundle(entry.name, entry.head.name), key)
        if row is not None:
            reused += 1
        elif problems := check(entry.head, entry.tuning):
            left_out.append(f"{entry.name} / {entry.head.name}: left out: {'; '.join(problems)}")
            continue
        elif place is not None and (objection := place.objection(entry.head)):
            left_out.append(objection)
            continue
        else:
            if held is None or held[0] != entry.name:
                held = None  # let go first: one embedding at a time
                on_disk = place is not None and place.on_disk
                held = entry.name, Embedded.of(stores.get(entry.name), own, on_disk, entry.tuning)
            try:
                row = _make_row(entry, own, held[1], config, files, key)
            except UnfittedError as error:
                left_out.append(
                    f"{entry.name} / {entry.head.name}: left out: {error.message}: {'; '.join(error.problems)}"
                )
                continue
        rows.append(row)
    if left_out and all(row.embedding == CONSTANT_GUESS for row in rows):
        raise HeadError("no head on images can be tuned", left_out)
    write_text_atomic(files.config, dump_yaml(config, files.root))
    leaderboard = judge(
        Leaderboard(tuple(rows), _provenance(config, files, task, stores, [*notes, *left_out])), files.root
    )
    leaderboard = replace(leaderboard, leaks=find_leaks(leaderboard, task, stores, files))
    write_text_atomic(files.leaderboard, leaderboard.to_json())
    write_text_atomic(files.leaderboard_md, leaderboard.to_markdown())
    return HeadsRun(leaderboard, files, reused)


def _entries(
    config: Config, records: Sequence[EmbeddingRecord], heads: Sequence[Head], tuning: TuningConfig, task: Task
) -> Iterator[Entry]:
    """Every row of the leaderboard to be: the heads on each backbone's embeddings, then the baselines."""
    for record in records:
        if record.kind == "backbone":
            yield from (Entry(record, head, tuning) for head in heads)
    for record in records:
        if record.kind == "baseline":
            yield Entry(record, BASELINE_HEAD, tuning)
    if config.baselines is None or CONSTANT_GUESS in config.baselines:
        yield Entry(
            None,
            _majority_head(task),
            tuning.model_copy(update={"trials": 1, "seconds": None, "pca": None, "whiten": False}),
        )


def _majority_head(task: Task) -> Head:
    """The guess that needs no image: always the most frequent class of all training images, in every fold the same.

    Fitted fold by fold it would change with which class the fold happens to leave most of, and be wrong on just the rest.
    """
    _, codes = np.unique(task.y_train, return_inverse=True)
    whole = len(np.unique(task.y_train)) == len(task.classes)

    def build(seed: int) -> Pipeline:
        guess = DummyClassifier(strategy="prior", random_state=seed)
        if whole:  # else folds and the last fit number the classes differently
            guess = FrozenEstimator(guess.fit(np.zeros((len(codes), 1)), codes))
        return Pipeline([("head", guess)])

    return Head(name="most_frequent", build=build, space={}, defaults={}, simplicity=-1, probabilities=True)


def _key(entry: Entry, task: Task, seed: int) -> str:
    """Name everything that determines a row."""
    return fingerprint(
        {
            "row": ROW_VERSION,
            "embedding": entry.record.fingerprint if entry.record else CONSTANT_GUESS,
            "task": task.key,
            "head": head_table.identity(entry.head, seed),
            "tuning": entry.tuning.model_dump(mode="json", exclude={"jobs", "memory"}),
            "seed": seed,
            "versions": bundles.versions(),
        }
    )


def _finished(folder: Path, key: str) -> LeaderboardRow | None:
    """The row of an earlier run that answered the same question and whose bundle is whole."""
    try:
        document = bundles.describe(folder)
        if document.get("provenance", {}).get("key") != key:
            return None
        bundle_file(folder, document["file"])
        Predictions.read(folder / "predictions.npz")
        return LeaderboardRow.from_record(document["provenance"]["row"])
    except (BundleError, KeyError, TypeError):
        return None


def _make_row(
    entry: Entry, task: Task, embedded: Embedded, config: Config, files: Artifacts, key: str
) -> LeaderboardRow:
    """Tune one head, score it once on the test images, and save its bundle."""
    record, head, spec = entry.record, entry.head, entry.record.spec if entry.record else None
    log.info("%s / %s", entry.name, head.name)
    X_train, X_test, projections = embedded.train, embedded.test, embedded.projections
    tuned = tune(
        head,
        X_train,
        task.y_train,
        task.folds,
        entry.tuning,
        config.seed,
        files.trials(entry.name, head.name),
        projections,
    )
    calibrator = calibrator_of(tuned, task)
    folder = files.bundle(entry.name, head.name)
    bundle = ModelBundle(
        head.name, tuned.best.params, task.classes, record.to_dict() if record else {}, tuned.pipeline, {}, calibrator
    )
    start = time.perf_counter()
    labels, probabilities = predict(bundle, X_test, entry.tuning)
    predict_seconds = time.perf_counter() - start
    best, metric = tuned.best, METRICS[tuned.scoring]
    tested = scores(task.test.labels, labels, probabilities, task.classes, config.seed, task.test.fold_groups(), metric)
    mean, journal = float(best.mean if best.mean is not None else np.nan), files.trials(entry.name, head.name)
    row = LeaderboardRow(
        embedding=entry.name,
        backbone=spec.architecture if spec else CONSTANT_GUESS,
        layer=spec.layer if spec else "",
        head=head.name,
        untrained=spec is not None and spec.untrained,
        baseline=spec is None or spec.kind == "baseline",
        unseen_rows=None if task.chose is None else len(task.train),
        chose_rows=task.chose or 0,
        task=task.key,
        cv_mean=mean,
        cv_std=best.spread or 0.0,
        cv_scores=tuple(float(score) for score in best.fold_scores if score is not None),
        test=tested,
        fit_seconds=tuned.fit_seconds,
        predict_seconds=predict_seconds,
        trials=len(tuned.trials),
        params=best.params,
        bundle=folder.relative_to(files.root).as_posix(),
        simplicity=head.simplicity,
        dim=spec.dim if spec else 0,
        search_seconds=tuned.seconds,
        embed_seconds=record.seconds_per_image if record else None,
        components=None if entry.tuning.pca is None else int(tuned.pipeline["pca"].n_components_),
        nested=repeats.nested(head, X_train, task, entry.tuning, config.seed, journal),
        seeds=repeats.seeds(head, (X_train, X_test), task, entry.tuning, config.seed, journal, (mean, tested.accuracy)),
        reweighted=repeats.reweighted(head, X_train, task, entry.tuning, config.seed, tuned, journal, projections),
        last_fit=tuned.last_fit,
        expected_test=_expected(tuned, task),
    )
    predictions = predictions_of(tuned, task, labels, probabilities, calibrator)
    provenance = {"key": key, "row": row.to_record(), "seed": config.seed, "strategy": tuned.strategy}
    bundles.save(replace(bundle, provenance=provenance), folder, {"predictions.npz": predictions.to_bytes()})
    return row


def _expected(tuned: TuningRun, task: Task) -> Interval:
    """Return where cross-validation lets expect the test accuracy."""
    correct = tuned.classes[tuned.out_of_fold.predictions] == task.y_train
    # All training images may add a share of what the folds' fits score better on their own images, as in `Promise.of`.
    own = float(np.mean(tuned.last_fit.fold_scores)) if tuned.scoring == "accuracy" else 1.0
    allowance = max(0.0, own - float(correct.mean())) / len(task.folds)
    return expected_accuracy(correct, len(task.test), task.groups, task.test.fold_groups(), allowance)


def _provenance(
    config: Config, files: Artifacts, task: Task, stores: Mapping[str, FeatureStore], notes: Sequence[str]
) -> dict[str, Any]:
    """What is needed to make the leaderboard again."""
    return {
        # The config as it was used, overrides included, is beside the leaderboard.
        "command": f"manyheads features {quote(str(files.config))}\nmanyheads heads {quote(str(files.config))}",
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "scoring": config.tuning.scoring,
        "task": task.key,
        "index": DatasetIndex.read(files.dataset).fingerprint(),
        "images": {"train": len(task.train), "test": len(task.test), "classes": len(task.classes)},
        "folds": len(task.folds),
        "notes": list(notes),
        "stores": {name: store.digest for name, store in stores.items()},
        "versions": {**bundles.versions(), **_feature_versions()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _feature_versions() -> dict[str, str]:
    """The installed libraries that features are made with; stage two itself needs none of them."""
    found = {}
    for name in ("torch", "torchvision", "Pillow"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
