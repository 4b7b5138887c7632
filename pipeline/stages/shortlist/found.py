"""What a shortlist found: the candidates with what they cost, which is recommended and why, as lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from pipeline.config import BackboneConfig
from pipeline.embed.backbone import Cost
from pipeline.embed.spec import EmbeddingSpec
from pipeline.evaluation import ACCURACY, Interval, Predictions
from pipeline.evaluation.intervals import share_interval
from pipeline.evaluation.leaderboard.judge import margin

Candidate = BackboneConfig | str
"""A network, or the name of a baseline."""


@dataclass(frozen=True)
class Entry:
    """One candidate's embedding, as it was last judged."""

    candidate: Candidate
    spec: EmbeddingSpec
    head: str
    out_of_fold: Predictions
    evidence: float
    """LogME on the sample."""
    cost: Cost
    seconds: float
    """What its network takes for an image here; decoding is the same for all."""
    dropped: bool = False
    tied: bool = False
    """Nothing shows that it is worse than the best."""
    behind: float = 0.0
    """How much less accurate than the best it may be: the end of the interval of the difference."""

    @property
    def section(self) -> BackboneConfig | None:
        """That of its network; None of a baseline."""
        return None if isinstance(self.candidate, str) else self.candidate

    @property
    def accuracy(self) -> float:
        """Out of fold."""
        return float(self.out_of_fold.correct.mean())

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the accuracy."""
        return share_interval(self.out_of_fold.correct, self.out_of_fold.units)


@dataclass(frozen=True)
class Shortlist:
    """What was found: `entries` best first, those that were dropped last."""

    entries: tuple[Entry, ...]
    images: int
    of: int
    """Training images that there are."""
    left_out: tuple[str, ...]
    """Lines on candidates that were not compared."""
    config: Path
    picture: Path

    @property
    def last(self) -> list[Entry]:
        """The entries that were judged on the whole sample."""
        return [entry for entry in self.entries if not entry.dropped]

    @property
    def chosen(self) -> Entry:
        """What is recommended."""
        return chosen(self.last)

    def summary_lines(self) -> Iterator[str]:
        """The table, and what follows from it."""
        yield (
            f"{len(self.entries)} embeddings on {self.images:,} of {self.of:,} training images; test images are "
            "not looked at"
        )
        yield from ("", self._table(), "")
        best, tied = self.entries[0], [entry for entry in self.last if entry.tied]
        if len(tied) > 1:
            yield f"~ these cannot be told apart from {best.spec.name} on {self.images:,} images."
        for entry in self.entries:
            if entry.dropped:
                yield (
                    f"dropped after {len(entry.out_of_fold):,} images, shown to be worse than the best: {entry.spec.name}"
                )
        yield from self.left_out
        yield from _by_size(self.entries)
        found = self.chosen
        yield f"use {found.spec.name}: {_why(found, self.last)}"
        yield f"config    {self.config}: `manyheads features` and `manyheads heads` run it as it is"
        yield f"picture   {self.picture}"

    def _table(self) -> str:
        head = ("", "embedding", "accuracy [95 %]", "judge", "images", "LogME", "parameters", "GFLOP", "ms/image", "MB")
        cells = [
            (
                "*" if entry is self.entries[0] else "~" if entry.tied else "",
                entry.spec.name,
                f"{100 * entry.accuracy:.1f} [{100 * entry.interval[0]:.1f}, {100 * entry.interval[1]:.1f}]",
                entry.head,
                f"{len(entry.out_of_fold):,}",
                f"{entry.evidence:.3f}",
                f"{entry.cost.parameters / 1e6:.1f} M" if entry.cost.parameters else "",
                f"{entry.cost.operations / 1e9:.2f}" if entry.cost.operations else "",
                f"{1000 * entry.seconds:.1f}",
                f"{entry.cost.megabytes:.0f}" if entry.cost.parameters else "",
            )
            for entry in self.entries
        ]
        return tabulate(cells, head, "simple", disable_numparse=True, colalign=("left", "left", *["right"] * 8))


def chosen(entries: Sequence[Entry]) -> Entry:
    """Return the quickest of those that are shown to be worse than the best by little at most, else the best; best first."""
    best = entries[0]
    allowed = margin(ACCURACY, best.accuracy, len(best.out_of_fold))
    near = [entry for entry in entries if entry is best or (entry.tied and entry.behind <= allowed)]
    return min(near, key=lambda entry: entry.seconds)


def _why(found: Entry, last: Sequence[Entry]) -> str:
    best, tied = last[0], [entry for entry in last if entry.tied]
    if found is not best:
        why = (
            f"the quickest that is shown to be at most {100 * found.behind:.1f} points worse than the best, {best.spec.name}, "
            f"with {1000 * found.seconds:.1f} ms an image"
        )
    elif len(tied) == 1:
        why = "all others are shown to be worse"
    else:
        why = "the best; that a quicker one is nearly as good is not shown on these images"
    floors = [entry.spec.name for entry in tied if entry.section is None]
    return f"{why}. That a network helps is not shown: see {' and '.join(floors)}" if floors else why


def _by_size(entries: Sequence[Entry]) -> Iterator[str]:
    """Say what the size of the networks, and LogME, would have told without any of this."""
    networks = [entry for entry in entries if entry.section is not None and not entry.spec.untrained]
    if len(networks) < 2:
        return
    best = max(entries, key=lambda entry: (not entry.dropped, entry.accuracy))
    whole = [entry for entry in networks if not entry.dropped] or networks
    largest = max(networks, key=lambda entry: (entry.cost.parameters, entry.cost.operations))
    likeliest = max(whole, key=lambda entry: entry.evidence)
    for means, entry in (("size", largest), ("LogME", likeliest)):
        if entry is best:
            yield f"{means} alone would have told you this: {entry.spec.name} is the {'largest' if means == 'size' else 'likeliest'}."
        elif entry.tied:
            yield f"{means} alone would have told you as much: it names {entry.spec.name}, which cannot be told apart from the best."
        else:
            yield f"{means} alone would have named {entry.spec.name}, which is shown to be worse than the best."
