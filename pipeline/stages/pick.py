"""Pick: which unlabelled images to label next, the reason, and the expected gain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.embed.records import EmbeddingRecord, open_features
from pipeline.errors import DatasetError, number_of
from pipeline.evaluation.learning_curve import ahead
from pipeline.evaluation.picking import TYPICAL_UNTIL, typical, unsure
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import digest_keys
from pipeline.io.files import require_place, write_text_atomic
from pipeline.report.material import CURVE_HEAD, gather
from pipeline.stages import extract, settings
from pipeline.stages.predict import to_lines
from pipeline.stages.similar import embedding_of, experiment_at

MOST_IMAGES = 20_000
"""Largest number of unlabelled images to compare with each other; of more, a random sample is used."""


@dataclass(frozen=True)
class PickRun:
    """The picked images."""

    output: Path
    picked: int
    images: int
    """Number of unlabelled images, without copies."""
    phase: str
    gain: str

    def summary_lines(self) -> list[str]:
        """Return the number picked, the reason, and the expected gain."""
        return [
            f"{self.picked:,} of {number_of(self.images, 'unlabelled image')} picked",
            f"phase  {self.phase}",
            f"gain   {self.gain}",
            f"written to {self.output}, most useful first; fill in its column `label`",
        ]


@dataclass(frozen=True)
class EarlierRun:
    """The labelled images, their embedding, and a head trained on them if it gives probabilities."""

    config: Config
    record: EmbeddingRecord
    index: DatasetIndex
    """Images with a label and a vector, including test images."""
    head: ModelBundle | None

    @property
    def files(self) -> Artifacts:
        """The experiment."""
        return Artifacts(self.config.output, self.config.store)

    @property
    def train(self) -> DatasetIndex:
        """The training images of heads."""
        return self.index.select("train", "validation")


def run(
    config: Config, place: Path | None = None, *, count: int = 50, output: Path = Path("next.csv"), trust: bool = False
) -> PickRun:
    """Embed a data set without labels, pick images, and write them as a CSV file.

    `place` is the experiment with the labelled images, as for `similar`. `trust` allows loading a pickled head.
    """
    if output.exists():
        raise DatasetError(f"{output}: exists already, and may have labels; name another file with --output")
    require_place(output)
    known = None if place is None else _known(experiment_at(place), trust)
    made = extract.without_labels(config if known is None else _embedded_alike(config, known))
    files = Artifacts(config.output, config.store) if known is None else known.files
    record = embedding_of(files)[0] if known is None else known.record
    store = open_features(record, files)
    pool = made.scan.index.rows(np.sort(np.unique(made.scan.index.digests, axis=0, return_index=True)[1]))
    taught = pool.digests[:0] if known is None else known.index.digests
    labelled, unread = np.isin(digest_keys(pool.digests), digest_keys(taught)), store.missing(pool.digests)
    if (labelled | unread).all():
        raise DatasetError(
            f"{pool.root}: no image is left to label: of {len(pool)} different ones {labelled.sum()} are among those with labels, "
            f"{(unread & ~labelled).sum()} cannot be read; give images that have none yet"
        )
    pool = pool.rows(~unread & ~labelled)
    images, count = len(pool), min(count, len(pool))
    if images > MOST_IMAGES:
        some = np.random.default_rng(config.seed).choice(images, max(MOST_IMAGES, count), replace=False)
        pool = pool.rows(np.sort(some))
    X, phase = store.read(pool.digests), _phase(known)
    guesses, probabilities = [["", ""]] * len(pool), None
    if known is not None and known.head is not None:
        labels, probabilities = known.head.predict(X)
        assert probabilities is not None  # `_known` keeps only heads with probabilities
        guesses = [[str(label), f"{p:.3f}"] for label, p in zip(labels, probabilities.max(axis=1), strict=True)]
    if probabilities is not None and phase.startswith(UNSURE):
        rows = unsure(X, probabilities, count, config.seed)
    else:
        every = np.concatenate([X, store.read(taught if known is None else known.train.digests)])
        rows = typical(every, np.arange(len(every)) >= len(X), count, config.seed)
    cells = [[str(pool.paths[row]), "", phase.partition(":")[0], *guesses[row]] for row in rows]
    write_text_atomic(output, to_lines([["path", "label", "why", "suggested", "probability"], *cells]))
    return PickRun(output, len(rows), images, phase, _gain(known, len(rows)))


def _known(files: Artifacts, trust: bool) -> EarlierRun:
    record, bundle = embedding_of(files)
    head = None if bundle is None else bundles.load(bundle, trust_code=trust)
    index = DatasetIndex.read(files.dataset)
    there = ~open_features(record, files).missing(index.digests) & index.has_labels()
    if head is not None and not (
        head.target.exclusive and head.predict(np.zeros((1, record.spec.dim), np.float32))[1] is not None
    ):
        head = None  # gives no probabilities
    return EarlierRun(settings.load(files.config), record, index.rows(there), head)


def _embedded_alike(config: Config, known: EarlierRun) -> Config:
    """Return the config of the unlabelled images with the embedding and stores of the labelled images."""
    parts = known.record.parts or (known.record,)
    spec = next((part.spec for part in parts if part.section is not None), known.record.spec)
    arithmetic = {"precision": spec.precision, "engine": spec.engine} if known.record.kind != "baseline" else {}
    changed = {
        "store": str(known.files.stores),
        "seed": known.config.seed,
        "backbones": tuple({str(part.section): part.section for part in parts if part.section is not None}.values()),
        "baselines": tuple(part.name for part in parts if part.section is None),
        "extraction": known.config.extraction.model_copy(update=arithmetic),
    }
    return config.model_copy(update=changed)


TYPICAL, UNSURE = "typical", "unsure"


def _phase(known: EarlierRun | None) -> str:
    """Return the kind of images to pick, and the reason."""
    n = 0 if known is None else len(known.train)
    if known is None or not n:
        return f"{TYPICAL}: no image has a label yet, so typical images come first"
    if known.head is None:
        return f"{TYPICAL}: there is no head that gives each class a probability, so typical images unlike the labelled ones come first"
    per_class = n / len(set(known.train.labels.ravel().tolist()))
    have = f"the {number_of(n, 'labelled training image')} are {per_class:.0f} per class"
    if per_class < TYPICAL_UNTIL:
        return f"{TYPICAL}: {have}, and below {TYPICAL_UNTIL} a head's uncertainty is not yet reliable"
    return f"{UNSURE}: {have}, and from {TYPICAL_UNTIL} on diverse images that the best head is unsure of are more informative"


def _gain(known: EarlierRun | None, count: int) -> str:
    """Return the gain that a learning curve predicts for as many images, and the evidence."""
    if known is None or not known.files.leaderboard.exists():
        return "not known: there is no learning curve before `manyheads heads` has compared heads on labelled images"
    found = gather(known.files.root)
    curve = found.curve
    if curve is None or curve.law is None or found.view is None:
        return "not known: too few labelled images for a learning curve, or no classes"
    now = found.view.labelled
    (low, high), before = ahead(curve, now + count, found.view.seed).interval, float(curve.law.accuracy([now])[0])
    expected = float(curve.law.accuracy([now + count])[0]) - before
    sizes = f"{curve.points[0].size:,} to {curve.points[-1].size:,}"
    return (
        f"{100 * expected:+.1f} points of accuracy [{100 * (low - before):+.1f}, {100 * (high - before):+.1f}] if picked at random, by "
        f"the learning curve of {CURVE_HEAD} on {found.view.embedding}, measured with {sizes} labelled images and extrapolated from {now:,} to "
        f"{now + count:,}"
    )
