"""Stage two: tune heads on the stored features and compare them on the same folds and test images.

Reads the index and the feature stores of stage one, needs neither the images nor torch, and writes one bundle per head and the
leaderboard. The best head is chosen by cross-validation, never by the test images.

A time budget is spent in passes over all rows. The first pass runs one trial per row; each further pass runs as many trials as fit
into the remaining time, at the rate of the pass before. Only the number of trials of the last pass affects the results: a config with
this number as `tuning.trials` gives the same leaderboard on any machine.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from threadpoolctl import threadpool_info

from pipeline import heads as head_table
from pipeline.config import Config, TuningConfig, dump_yaml
from pipeline.data import DatasetIndex
from pipeline.data.targets import CONSTANT_GUESSES, record_of
from pipeline.embed.published import NO_WEIGHTS
from pipeline.embed.records import (
    CONCAT,
    EmbeddingRecord,
    concatenated,
    open_features,
    read_asked_records,
    require_index,
)
from pipeline.errors import HeadError, PipelineError, UnfittedError
from pipeline.evaluation import metric_of
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, recommend
from pipeline.evaluation.leaderboard.recommendation import advice
from pipeline.experiment import AUDIT, BUDGET, Artifacts, read_document, write_document, write_record
from pipeline.export import bundle as bundles
from pipeline.heads import TABLES, Head
from pipeline.heads.layer_profile import LayerProfile, what_to_take
from pipeline.heads.tuning import limited, require, seconds_of_trials
from pipeline.heads.tuning.room import divided, is_spread, on, spread
from pipeline.io.digests import fingerprint
from pipeline.io.files import write_text_atomic
from pipeline.io.process import bar, look_in, version
from pipeline.io.remote import Engine
from pipeline.stages.train_heads import layers
from pipeline.stages.train_heads.apart import vote_row
from pipeline.stages.train_heads.domains import with_domains
from pipeline.stages.train_heads.row import finished_row, make_row, row_key
from pipeline.stages.train_heads.strangers import find_leaks, with_strangers
from pipeline.stages.train_heads.task import Asked, Embedding, SharedFeatures, Task, make_task, unseen_task
from pipeline.stages.train_heads.views import with_views
from pipeline.store import FeatureStore, JoinedStores

__all__ = ["HeadsRun", "Task", "make_task", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadsRun:
    """The results of stage two."""

    leaderboard: Leaderboard
    files: Artifacts
    reused: int
    """Number of heads that an earlier run had finished, and that were not tuned again."""
    profiles: tuple[LayerProfile, ...] = ()
    """The layer profiles of networks with several embedded layers."""

    def summary_lines(self) -> list[str]:
        """Return the leaderboard and the paths of all results as lines of text."""
        best, chosen, root = self.leaderboard.best, self.leaderboard.recommended, self.files.root
        runs_code = best.bundle and bundles.describe(root / best.bundle).get("runs_code_when_loaded")
        lines = [self.leaderboard.to_text(), ""]
        if self.reused:
            lines.append(f"{self.reused} of {len(self.leaderboard.rows)} rows were finished before and kept.")
        lines += [
            f"leaderboard  {self.files.leaderboard_md} and {self.files.leaderboard.name}",
            f"best head    {root / best.bundle}" if best.bundle else "best head    none: a constant guess won",
            f"to predict   manyheads predict {quote(str(root))} IMAGES --output labels.csv{' --trust' * bool(runs_code)}",
        ]
        if chosen.key != best.key and chosen.bundle and not chosen.constant:
            lines.append(f"recommended  {root / chosen.bundle}")
        lines += [f"layers       {found.network}: {what_to_take(found)[0]}" for found in self.profiles]
        return lines


def ask(config: Config) -> Asked:
    """Open the features of a config and list the heads to tune on each embedding; raises the same errors as `run`."""
    files = Artifacts(config.output)
    records = read_asked_records(files.features, config)
    index = DatasetIndex.read(files.dataset)
    made_of = index.fingerprint()
    require_index(files.features, made_of)
    records += concatenated(config.concat, records)
    stores = {record.name: open_features(record, files) for record in records}
    task = make_task(config, files, index, list(stores.values()))
    heads = head_table.resolve_all(config.heads, task.target.kind)
    scoring = metric_of(config.tuning.scoring, task.target).name
    config = config.model_copy(update={"tuning": config.tuning.model_copy(update={"scoring": scoring})})
    return Asked(config, files, records, made_of, stores, task, list(_embeddings(config, records, stores, heads, task)))


def run(config: Config, engine: Engine | None = None) -> HeadsRun:
    """Tune every head on every embedding and rank them.

    With an `engine`, or within `joblib.parallel_config` of a distributed backend, the rows are made on its workers.

    PipelineError if stage one has not been run for this config, the data cannot be cross-validated, or a head is invalid.
    """
    require(config.tuning.strategy)
    asked = ask(config)
    given, files, task, scoring = asked.config, asked.files, asked.task, asked.config.tuning.scoring
    with on(engine):
        asked, made, cut = _within_budget(asked)
    rows, left_out = made.rows, made.left_out
    if left_out and all(row.constant for row in rows):
        raise HeadError("no head on images can be tuned", left_out)
    if asked.config.vote:
        voted = vote_row(rows, asked)
        (left_out if isinstance(voted, str) else rows).append(voted)  # type: ignore[arg-type]
    write_text_atomic(files.config, dump_yaml(given, files.root))
    on_disk = [embedding.sentence() for embedding in asked.embeddings if embedding.on_disk]
    notes = [*cut, *on_disk, *advice(task.y_train, task.target, scoring), *left_out]
    board = with_strangers(recommend(Leaderboard(tuple(rows), _provenance(asked, notes)), files.root), asked)
    leaks, findings = find_leaks(board, asked)
    board = with_domains(with_views(replace(board, leaks=leaks), asked), asked)
    write_record(files.audit, AUDIT, findings)
    write_text_atomic(files.leaderboard, board.to_json())
    write_text_atomic(files.leaderboard_md, board.to_markdown())
    return HeadsRun(board, files, made.reused, layers.profiles(asked))


@dataclass
class _Rows:
    """All rows, messages on the heads left out, the number of rows reused from earlier runs, and the seconds of making them all."""

    rows: list[LeaderboardRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    reused: int = 0
    seconds: float = 0.0


def _rows(asked: Asked) -> _Rows:
    """Make every row of the config, or reuse the finished one of an earlier run."""
    made, config, files = _Rows(), asked.config, asked.files
    tried = _spread_rows(asked) if is_spread() else set[str]()
    for embedding in asked.embeddings:
        license = NO_WEIGHTS if embedding.record is None else embedding.record.spec.license
        vectors = SharedFeatures(embedding)  # read when first needed, and freed before the next embedding's
        for head in embedding.heads:
            key, folder = row_key(head, embedding, config.seed), files.bundle(embedding.name, head.name)
            start = time.perf_counter()
            try:
                row = finished_row(folder, key)
                made.reused += row is not None and key not in tried
                made.seconds += 0 if row is None else (row.search_seconds or 0) + row.fit_seconds
                row = row or make_row(head, embedding, vectors, asked, key)
                made.rows.append(replace(row, license=license))
            except UnfittedError as error:
                why = ": ".join(filter(None, [error.message, "; ".join(error.problems)]))
                made.left_out.append(f"{embedding.name} / {head.name}: left out: {why}")
            made.seconds += time.perf_counter() - start
    return made


def _spread_rows(asked: Asked) -> set[str]:
    """Make the unfinished rows on the active distributed backend; return the keys of the rows that were tried.

    Each row is one task, which writes its bundle and its journal to the shared output folder. The features of an embedding are one
    memory-mapped file, which each node holds in memory once. Heads that cannot be fitted are left to the caller, who reports the reason.
    """
    config, files, tasks, keys = asked.config, asked.files, [], set()
    document = config.model_copy(update={"tuning": divided(config.tuning)}).model_dump_json()
    folder = Path(os.path.abspath(files.root)) / "mapped"
    try:
        for place, embedding in enumerate(asked.embeddings):
            keyed = [(head.name, row_key(head, embedding, config.seed)) for head in embedding.heads]
            fresh = [each for each in keyed if finished_row(files.bundle(embedding.name, each[0]), each[1]) is None]
            if embedding.store is not None and fresh:
                vectors = SharedFeatures(embedding, folder)
                assert len(vectors.train) + len(vectors.test) > 0  # the files are written, once for all workers
                tasks += [(place, name) for name, _ in fresh]
                keys |= {key for _, key in fresh}
        same = (document, fingerprint({"rows": sorted(keys)}), os.getcwd(), folder)
        with bar(len(tasks), "heads", "tuning on the workers") as progress:
            for _ in spread(_make, [(*same, *task) for task in tasks]) if tasks else ():
                progress.update()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return keys


def _make(config: str, rows: str, working: str, folder: Path, place: int, name: str) -> None:
    """Make one row in a worker; `place` is the embedding's position in `Asked.embeddings`, `name` the head's name."""
    os.chdir(working)
    look_in(Path(working))
    asked = _asked(config, rows)
    embedding = asked.embeddings[place]
    head = next(head for head in embedding.heads if head.name == name)
    key = row_key(head, embedding, asked.config.seed)
    with suppress(UnfittedError):
        make_row(head, embedding, SharedFeatures(embedding, folder), asked, key)


@lru_cache(1)
def _asked(config: str, rows: str) -> Asked:
    """Open the features once per worker and set of rows; `rows` is only a cache key."""
    return ask(Config.model_validate_json(config))


class Pass(NamedTuple):
    """A pass over all rows: trials per row, total seconds, and the seconds of these spent on trials."""

    trials: int
    seconds: float
    searching: float


def _within_budget(asked: Asked) -> tuple[Asked, _Rows, list[str]]:
    """Make the rows with as many trials as the time budget allows; return the request with this number, the rows, and a note on any cut.

    Finished passes are stored, so that an interrupted run resumes and a second run has nothing to do.
    """
    tuning, files, seed = asked.config.tuning, asked.files, asked.config.seed
    limit, made, reused = tuning.budget_seconds, None, None
    if limit is None:
        return asked, _rows(asked), []
    every = [(each, head) for each in asked.embeddings for head in each.heads]
    key, passes = fingerprint({"rows": [row_key(head, each, seed) for each, head in every]}), list[Pass]()
    with suppress(PipelineError, KeyError, TypeError):
        found = read_document(files.budget, BUDGET)
        passes = [Pass(*each) for each in found["passes"]] if found["key"] == key else []
    while (trials := next_trials(passes, tuning.trials, limit)) is not None:
        made = _rows(_with_trials(asked, trials))
        reused = made.reused if reused is None else reused
        searching = sum(seconds_of_trials(files.trials(each.name, head.name)) for each, head in every)
        passes.append(Pass(trials, made.seconds, searching))
        write_document(files.budget, BUDGET, {"key": key, "passes": passes})
    trials, spent, cut = passes[-1].trials, sum(each.seconds for each in passes), list[str]()
    if trials < tuning.trials:
        over = ", which is more than that: no row can have less than one" * (trials == 1 and spent > limit)
        cut = [
            f"The budget of {tuning.budget} cut the search: {trials} of {tuning.trials} trials for every row, in {spent:.0f} s{over}. "
            "More time may find better parameters."
        ]
    asked = _with_trials(asked, trials)
    made = made or _rows(asked)
    return asked, replace(made, reused=made.reused if reused is None else reused), cut


def next_trials(passes: Sequence[Pass], asked: int, limit: float) -> int | None:
    """Return the trials per row of the next pass, at the rate of the last; None if all are done, or no time is left for twice as many."""
    if not passes:
        return 1
    trials, seconds, searching = passes[-1]
    left = limit - sum(each.seconds for each in passes) - (seconds - searching)
    more = min(asked, int(left * trials / searching)) if searching else asked
    return more if trials < more and (more == asked or more >= 2 * trials) else None


def _with_trials(asked: Asked, trials: int) -> Asked:
    """Return the request with another number of trials and no budget; the constant guess keeps its single trial."""

    def changed(tuning: TuningConfig) -> TuningConfig:
        return tuning.model_copy(update={"trials": min(trials, tuning.trials), "budget": None})

    config = asked.config.model_copy(update={"tuning": changed(asked.config.tuning)})
    embeddings = [replace(each, tuning=changed(each.tuning)) for each in asked.embeddings]
    return replace(asked, config=config, embeddings=embeddings)


def _embeddings(
    config: Config,
    records: Sequence[EmbeddingRecord],
    stores: Mapping[str, FeatureStore | JoinedStores],
    heads: Sequence[Head],
    task: Task,
) -> Iterator[Embedding]:
    """Yield the embeddings that heads are tuned on: those of backbones, concatenated ones, baselines, and the constant guess."""
    tuning, table = limited(config.tuning), TABLES[task.target.kind]
    for kind, chosen in (("backbone", tuple(heads)), (CONCAT, tuple(heads)), ("baseline", (table.baseline,))):
        for record in records:
            if record.kind == kind:
                yield Embedding(chosen, unseen_task(task, record, config), tuning, record, stores[record.name])
    if config.baselines is None or not CONSTANT_GUESSES.isdisjoint(
        config.baselines
    ):  # it has another name for each target
        once = tuning.model_copy(update={"trials": 1, "pca": None})
        yield Embedding((table.guess(task.y_train, task.target.width),), task, once)


def _provenance(asked: Asked, notes: Sequence[str]) -> dict[str, Any]:
    """Return everything needed to reproduce the leaderboard."""
    config, files, task = asked.config, asked.files, asked.task
    # Stage two itself needs none of these packages.
    features_made_by = {name: found for name in ("torch", "torchvision", "Pillow") if (found := version(name))}
    return {
        # The config as used, overrides included, is saved next to the leaderboard.
        "command": f"manyheads features {quote(str(files.config))}\nmanyheads heads {quote(str(files.config))}",
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "scoring": config.tuning.scoring,
        "task": task.key,
        "index": asked.index,
        "images": {"train": len(task.train), "test": len(task.test), "classes": task.target.width},
        "target": record_of(task.target),
        "folds": len(task.folds),
        "notes": list(notes),
        "stores": {name: store.digest for name, store in asked.stores.items()},
        "precision": {record.name: record.spec.precision for record in asked.records},
        "versions": {**bundles.versions(), **features_made_by},
        "machine": _machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str:
    """Describe what affects rounding: the operating system, the processor type, and the BLAS and OpenMP libraries with their target."""
    libraries = {
        f"{each['internal_api']} {each['version']} {each.get('architecture', '')}".strip() for each in threadpool_info()
    }
    return ", ".join([f"{platform.system()} {platform.machine()}", *sorted(libraries)])
