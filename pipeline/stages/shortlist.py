"""Shortlist: which networks are worth a full run on these images, and their costs, based on a sample of the training images.

Candidates are embedded into the feature stores, so a later run of `features` reuses the sample. Each is evaluated with
ridge and nearest neighbours, out of fold; losers are dropped early, by successive halving over the sample (Jamieson and
Talwalkar, AISTATS 2016), but only if they are significantly worse than the best. Test images are not used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import cross_val_predict
from tabulate import tabulate
from threadpoolctl import threadpool_limits

from pipeline.config import BackboneConfig, Config, dump_yaml, names_code
from pipeline.data import DatasetIndex
from pipeline.data.scan import scan
from pipeline.data.targets import Classification
from pipeline.embed import baselines
from pipeline.embed.backbone import Backbone
from pipeline.embed.published import STAND_IN, require_permitted
from pipeline.embed.spec import EmbeddingModel, EmbeddingSpec, probe_images
from pipeline.embed.weights import license_of, to_fetch
from pipeline.errors import BackboneError, ConfigError, DatasetError, PipelineError, number_of
from pipeline.evaluation import ACCURACY, Interval, Predictions, compare
from pipeline.evaluation.intervals import share_interval
from pipeline.evaluation.leaderboard.recommendation import margin
from pipeline.evaluation.learning_curve import stratified_order
from pipeline.evaluation.logme import logme
from pipeline.experiment import Artifacts
from pipeline.heads import HEADS, KNN, RIDGE, configure
from pipeline.heads.tuning import Folds, make_folds
from pipeline.io.files import make_folder, write_text_atomic
from pipeline.stages.backbones import HERE, NetworkRow, rows
from pipeline.stages.extract import Contents, embed_some
from pipeline.stages.extract.stores import enter
from pipeline.stages.targets import of_classes

FOLDS = 5
RUNGS = (4, 2, 1)
"""Divisors of the sample's size per rung: a quarter, a half, all of it."""
LEAST_IMAGES = 10
"""Number of training images below which a full run would be refused or uninformative."""
LEAST = 100
"""Smallest number of images of a rung: with fewer no candidate is shown to be worse."""
JUDGES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    RIDGE.name: [{"alpha": 10.0**power} for power in (0, 1, 2, 3, 4)],
    KNN.name: [{}, {"n_neighbors": 15}],
}
"""Fast heads and the parameters to try; the best of them scores a candidate."""
TIMED, REPEATS = 4, 3
"""Number of images in the timed batch, and number of repetitions."""

ShortlistCandidate = BackboneConfig | str
"""A network, or the name of a baseline."""


@dataclass(frozen=True)
class Entry:
    """One candidate's embedding and its latest evaluation."""

    candidate: ShortlistCandidate
    spec: EmbeddingSpec
    head: str
    out_of_fold: Predictions
    evidence: float
    """LogME on the sample."""
    parameters: int
    """0 for a baseline."""
    megabytes: float
    """Size of the weights."""
    seconds: float
    """Seconds of its network per image on this machine; decoding is the same for all."""
    dropped: bool = False
    tied: bool = False
    """Whether it is not significantly worse than the best."""
    behind: float = 0.0
    """The largest plausible difference in accuracy to the best: the upper end of the interval."""

    @property
    def section(self) -> BackboneConfig | None:
        """The section of its network; None for a baseline."""
        return None if isinstance(self.candidate, str) else self.candidate

    @property
    def accuracy(self) -> float:
        """Out-of-fold accuracy."""
        return float(self.out_of_fold.correct.mean())

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the accuracy."""
        return share_interval(self.out_of_fold.correct, self.out_of_fold.units)


@dataclass(frozen=True)
class Shortlist:
    """The result: `entries` with the best first and dropped ones last."""

    entries: tuple[Entry, ...]
    images: int
    of: int
    """Number of training images available."""
    left_out: tuple[str, ...]
    """Lines on candidates that were not compared."""
    config: Path

    @property
    def chosen(self) -> Entry:
        """The fastest entry that is shown to be at most slightly worse than the best, or else the best."""
        best = self.entries[0]
        allowed = margin(ACCURACY, best.accuracy, len(best.out_of_fold))
        near = [entry for entry in self.entries if entry is best or (entry.tied and entry.behind <= allowed)]
        return min(near, key=lambda entry: entry.seconds)

    def summary_lines(self) -> Iterator[str]:
        """Return the table, and the conclusions."""
        yield f"{len(self.entries)} embeddings on {self.images:,} of {self.of:,} training images; test images are not looked at"
        yield from ("", self._table(), "")
        best, tied = self.entries[0], [entry for entry in self.entries if entry.tied]
        if len(tied) > 1:
            yield f"~ these cannot be told apart from {best.spec.name} on {self.images:,} images."
        for entry in self.entries:
            if entry.dropped:
                yield f"dropped after {len(entry.out_of_fold):,} images, shown to be worse than the best: {entry.spec.name}"
        yield from self.left_out
        networks = [entry for entry in self.entries if entry.section is not None and not entry.spec.untrained]
        if len(networks) > 1 and max(networks, key=lambda entry: entry.parameters) is best:
            yield f"size alone would have told you this: {best.spec.name} is the largest."
        if len(networks) > 1 and max(networks, key=lambda entry: (not entry.dropped, entry.evidence)) is best:
            yield f"LogME alone would have told you this: {best.spec.name} is the likeliest."
        yield f"use {self.chosen.spec.name}: {self._why()}"
        yield f"config    {self.config}: `manyheads features` and `manyheads heads` run it as it is"

    def _table(self) -> str:
        head = ("", "embedding", "accuracy [95 %]", "judge", "images", "LogME", "parameters", "ms/image", "MB")
        cells = [
            (
                "*" if entry is self.entries[0] else "~" if entry.tied else "",
                entry.spec.name,
                f"{100 * entry.accuracy:.1f} [{100 * entry.interval[0]:.1f}, {100 * entry.interval[1]:.1f}]",
                entry.head,
                f"{len(entry.out_of_fold):,}",
                f"{entry.evidence:.3f}",
                f"{entry.parameters / 1e6:.1f} M" if entry.parameters else "",
                f"{1000 * entry.seconds:.1f}",
                f"{entry.megabytes:.0f}" if entry.parameters else "",
            )
            for entry in self.entries
        ]
        return tabulate(cells, head, "simple", disable_numparse=True, colalign=("left", "left", *["right"] * 7))

    def _why(self) -> str:
        best, chosen, tied = self.entries[0], self.chosen, [entry for entry in self.entries if entry.tied]
        if chosen is not best:
            why = f"the fastest that is shown to be at most {100 * chosen.behind:.1f} points worse than the best, {best.spec.name}"
        elif len(tied) == 1:
            why = "all others are shown to be worse"
        else:
            why = "the best; no faster one is shown to be nearly as good on these images"
        floors = [entry.spec.name for entry in tied if entry.section is None]
        return f"{why}. These images do not show that a network helps: see {' and '.join(floors)}" if floors else why


def run(config: Config, images: int = 1000, candidates: Sequence[str] = ()) -> Shortlist:
    """Evaluate the candidates on a stratified sample of the training images, and write the config of those worth a full run.

    `candidates` are NAME or NAME/WEIGHTS of networks, `module:function`, or baselines; by default all that are available here.
    """
    columns = config.dataset.label_columns
    of_classes(config, "shortlists are")
    if len(columns) > 1:
        raise ConfigError(
            f"a shortlist is of one column of classes; set dataset.label_columns to one of {', '.join(columns)}"
        )
    alive, left_out = _candidates(config, candidates)
    files = Artifacts(config.output, config.store)
    scanned = scan(config.dataset, config.seed, files.dataset)
    contents = Contents.of(scanned.index, files, config)
    enter(files)
    learned = np.isin(scanned.index.splits[contents.rows], ("train", "validation"))
    places = np.flatnonzero(learned & ~contents.failed)
    part = scanned.index.rows(contents.rows[places])
    target = Classification.of(part)
    if problem := target.problem(target.encode(part)):
        raise DatasetError(problem)
    if len(places) < LEAST_IMAGES:
        raise DatasetError(f"a shortlist needs {LEAST_IMAGES} training images at least, and there are {len(places)}")
    order = places[stratified_order(part.labels.astype(str), config.seed)[:images]]
    sizes = sorted({len(order) // part for part in RUNGS if len(order) // part >= LEAST} | {len(order)})
    entries: dict[str, Entry] = {}
    for size in sizes:
        taken = np.sort(order[:size])
        some = contents.part(taken)
        judged = list[Entry]()
        for one in alive:
            try:
                judged += _judged(one, config, scanned.index, contents, some)
            except BackboneError as error:  # weights on disk may be damaged, or of another version
                left_out.append(f"left out: {error}")
        found, others = _comparable(judged)
        left_out += others
        entries |= _compared(found, config.seed, final=size == sizes[-1])
        alive = [one for one in alive if any(each.candidate == one and not each.dropped for each in entries.values())]
    ordered = sorted(entries.values(), key=lambda entry: (entry.dropped, -entry.accuracy, entry.seconds))
    return _written(config, files, ordered, len(order), len(places), left_out)


def _candidates(config: Config, words: Sequence[str]) -> tuple[list[ShortlistCandidate], list[str]]:
    """Return the candidates, and lines on networks that are not available or not permitted by the config's `licenses`."""
    table = [row for row in rows([word.partition("/")[0] for word in words]) if row.weights]
    sections = list(config.backbones)
    if words:
        found = [_named(word, table) for word in words if word not in baselines.NAMES]
        wrong = [each for each in found if isinstance(each, str)]
        if wrong:
            problems = [*wrong, "a shortlist uses only networks that are here, and fetches nothing"]
            raise BackboneError(f"{number_of(len(wrong), 'candidate')} cannot be had", problems)
        sections = [section for each in found if not isinstance(each, str) for section in each]
    else:
        sections += [BackboneConfig(name=row.name, weights=row.weights) for row in table if row.where == HERE]
        sections += [STAND_IN] if any(row.weights == "bundled" for row in table) else []
    allowed, left_out = list[ShortlistCandidate](), list[str]()
    for section in sections:
        try:
            require_permitted(config.licenses, [(section.title, license_of(section))])
            if to_fetch(section) is not None:
                raise BackboneError(f"{section.title} is not here, and a shortlist fetches nothing")
            allowed += [section] if section not in allowed else []
        except PipelineError as error:
            left_out += [f"left out: {line}" for line in error.problems or [error.message]]
    return [*allowed, *(name for name in baselines.NAMES if name in words or not words)], left_out


def _named(word: str, table: Sequence[NetworkRow]) -> list[BackboneConfig] | str:
    """Return the networks with a name, or the reason why there are none."""
    if names_code(word):
        return [BackboneConfig.model_validate({"name": word})]
    name, _, weights = word.partition("/")
    if weights == "random":
        return [BackboneConfig(name=name, weights=weights)]
    found = [row for row in table if row.name == name and weights in ("", row.weights)]
    here = [BackboneConfig(name=row.name, weights=row.weights) for row in found if row.where == HERE]
    if not here:
        where = f"is {found[0].where}" if found else "is none of those that `manyheads backbones` lists"
        return f"candidate {word!r} {where}"
    return here


def _judged(
    candidate: ShortlistCandidate, config: Config, index: DatasetIndex, contents: Contents, some: Contents
) -> Iterator[Entry]:
    """Embed a part of the sample with one candidate, and evaluate its embeddings."""
    for target, store in embed_some(config, candidate, contents, some):
        there = ~store.missing(some.digests)
        part = index.rows(some.rows[there])
        X, y, groups = store.read(some.digests[there]), Classification.of(part).encode(part), part.fold_groups()
        head, guesses = best_guesses(X, y, make_folds(y, FOLDS, config.seed, groups), config.seed)
        embedder = target.source.load()
        weight = embedder.weight() if isinstance(embedder, Backbone) else (0, 0.0)
        said = Predictions(y, guesses, units=groups)
        yield Entry(candidate, target.spec, head, said, logme(X, y), *weight, _seconds(embedder))


def _seconds(embedder: EmbeddingModel) -> float:
    """Return the seconds per image, as the minimum of several runs, since other load can only add to it."""
    size, spent = embedder.preprocessing.size, []
    batch = np.resize(probe_images(size), (TIMED, *size, 3))
    for _ in range(REPEATS):
        began = time.perf_counter()
        embedder.embed(batch)
        spent.append((time.perf_counter() - began) / TIMED)
    return min(spent)


def _comparable(judged: Sequence[Entry]) -> tuple[dict[str, Entry], list[str]]:
    """Return the comparable entries by fingerprint, and lines on the others."""
    found, lines = dict[str, Entry](), list[str]()
    most = max((len(entry.out_of_fold) for entry in judged), default=0)
    for entry in judged:
        if entry.spec.trained_on is not None:
            lines.append(f"left out: {entry.spec.name}: its network has learned from images like these")
        elif len(entry.out_of_fold) < most:
            lines.append(f"left out: {entry.spec.name}: it has vectors of {len(entry.out_of_fold):,} images only")
        else:
            found[entry.spec.fingerprint()] = entry
    if not found:
        raise BackboneError("no candidate can be judged", lines)
    return found, lines


def best_guesses(
    X: NDArray[np.float32], y: NDArray[np.int64], folds: Folds, seed: int
) -> tuple[str, NDArray[np.int64]]:
    """Return the name of the head with the highest out-of-fold accuracy, and its predictions.

    X : ndarray of shape (n, dim), float32; y : ndarray of shape (n,), int64; returns the head's name, and an ndarray of y's shape
    """
    found: list[tuple[str, NDArray[np.int64]]] = []
    with threadpool_limits(limits=1, user_api="blas"):
        for name, choices in JUDGES.items():
            for params in choices:
                given: dict[str, Any] = {**HEADS[name].defaults, **params}
                if "n_neighbors" in given:
                    given["n_neighbors"] = min(given["n_neighbors"], *(len(train) for train, _ in folds))
                head = configure(HEADS[name], given, seed)
                found.append((name, cross_val_predict(head, X, y, cv=folds)))
    return max(found, key=lambda each: float(np.mean(each[1] == y)))


def _compared(found: dict[str, Entry], seed: int, final: bool) -> dict[str, Entry]:
    """Mark the entries of a rung that are not significantly worse than the best; the other ones in the worse half are dropped."""
    order = sorted(found, key=lambda name: (-found[name].accuracy, found[name].seconds))
    answers = {name: found[name].out_of_fold for name in order}
    behind = compare(answers, order[0], seed=seed, metric=ACCURACY) if len(order) > 1 else ()
    tied = {order[0], *(row.key for row in behind if row.no_evidence)}
    furthest = {row.key: row.interval[1] for row in behind}
    worse_half = order[(len(order) + 1) // 2 :]
    return {
        name: replace(
            found[name],
            tied=name in tied and final,
            behind=furthest.get(name, 0.0),
            dropped=not final and name in worse_half and name not in tied,
        )
        for name in order
    }


def _written(
    config: Config, files: Artifacts, entries: Sequence[Entry], images: int, of: int, left_out: Sequence[str]
) -> Shortlist:
    """Write the config of the remaining networks."""
    networks = [entry for entry in entries if entry.section is not None and not entry.dropped]
    if not networks:
        raise BackboneError("no network is left to write a config of; name some with --candidates")
    kept = {str(each.section): each.section for each in networks if each.tied} or {"": networks[0].section}
    survivors = config.model_copy(update={"backbones": tuple(kept.values())})
    make_folder(files.root)
    made = files.root / "shortlist.yaml"
    header = f"# The networks that cannot be told apart from the best on {images:,} of {of:,} training images: manyheads shortlist\n"
    write_text_atomic(made, header + dump_yaml(survivors, files.root))
    return Shortlist(tuple(entries), images, of, tuple(left_out), made)
