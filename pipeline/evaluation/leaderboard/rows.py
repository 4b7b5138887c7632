"""The records of a leaderboard and their JSON: a row, its repeated searches, near-duplicate leaks, the recommendation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from pipeline.data.targets import CONSTANT_GUESSES
from pipeline.evaluation import ACCURACY, Difference, Metric, Optimism, Scores
from pipeline.evaluation.intervals import Interval, repeated_interval
from pipeline.experiment import from_plain, plain


@dataclass(frozen=True)
class Nested:
    """Nested cross-validation of a row: its search repeated within every outer fold, scored on the held-out images.

    `inner` has the best mean score of each search on its own training images, `outer` the score of its winner on the held-out
    images, one number per outer fold.
    """

    inner: tuple[float, ...]
    outer: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The unbiased score: the mean of `outer`."""
        return float(np.mean(self.outer))

    @property
    def interval(self) -> Interval:
        """Its 95 % interval, with the variance over folds corrected for shared training images."""
        return repeated_interval(self.outer)


@dataclass(frozen=True)
class Seeds:
    """The search repeated with other seeds for folds, search and head, on the same test images; one number per seed."""

    seeds: tuple[int, ...]
    cv_means: tuple[float, ...]
    test_scores: tuple[float, ...]

    @property
    def cv(self) -> tuple[float, float]:
        """Mean and standard deviation of the cross-validation means."""
        return float(np.mean(self.cv_means)), float(np.std(self.cv_means, ddof=1))


@dataclass(frozen=True)
class LastFit:
    """The saved fit on all training images, compared with the cross-validation fits.

    `score` and `fold_scores` are in the tuned metric, each on the images of its own fit. `sound` is whether `score`, after `tries`
    seeds, is not below the lowest of `fold_scores` by more than chance. `warnings` of the saved fit and `fold_warnings` of the
    chosen trial's fits are counts by category.
    """

    score: float
    fold_scores: tuple[float, ...]
    tries: int
    sound: bool
    warnings: Mapping[str, int] = field(default_factory=dict)
    fold_warnings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LeaderboardRow:
    """One tuned head on one embedding.

    `cv_mean` is the score of all held-out predictions, `cv_std` the standard deviation of `cv_scores`, the fold scores at the
    chosen parameters; higher is better, so a log loss is negated. `bundle` is the bundle's folder relative to the output
    folder. `simplicity` ranks the kinds of heads, lowest being simplest. `embed_seconds` is the time to embed one image, if known.
    `nested` and `seeds` are None unless requested.
    """

    embedding: str
    backbone: str
    layer: str
    head: str
    untrained: bool
    baseline: bool
    cv_mean: float
    cv_std: float
    cv_scores: tuple[float, ...]
    test: Scores | None
    fit_seconds: float
    predict_seconds: float
    trials: int
    params: Mapping[str, Any] = field(default_factory=dict)
    bundle: str | None = None
    simplicity: float = 0
    dim: int | None = None
    license: str = ""
    """Licence of the backbone's weights; '' in rows of earlier versions."""
    search_seconds: float | None = None
    embed_seconds: float | None = None
    unseen_rows: int | None = None
    """Training images that a fine-tuned network has not seen, the only ones its heads use; None where heads use all."""
    chose_rows: int = 0
    """Number of these images that selected the network's weights: cross-validation on them is biased, so its score is hidden."""
    task: str = ""
    """Digest of the images, labels and folds of the row; rows on other images are ranked separately."""
    components: int | None = None
    """Principal components that the head works on; None where it works on the features themselves."""
    nested: Nested | None = None
    seeds: Seeds | None = None
    reweighted: Scores | None = None
    """Out-of-fold scores with class weights toggled, for imbalanced classes and heads that support them."""
    last_fit: LastFit | None = None
    expected_test: Interval | None = None
    """The 99.9 % prediction interval of the test accuracy from out-of-fold predictions; None for targets without an accuracy."""
    apart: str = ""
    """Why the row is a variant of another row's head, `domains` or `views`, and so never the best; '' for ordinary rows."""

    @property
    def key(self) -> str:
        """The row's name: `embedding/head`."""
        return f"{self.embedding}/{self.head}"

    @property
    def images(self) -> str:
        """A key shared by the rows that are cross-validated on the same images."""
        if self.apart:
            return self.apart
        return "" if self.unseen_rows is None else f"{self.unseen_rows} of {self.task}"

    def to_record(self) -> dict[str, Any]:
        """Return the row as plain values for JSON."""
        test, reweighted = (found and found.to_record() for found in (self.test, self.reweighted))
        return dict(plain({**vars(self), "test": test, "reweighted": reweighted}))

    @staticmethod
    def from_record(raw: Mapping[str, Any]) -> LeaderboardRow:
        """Return the row that `to_record` wrote; ValueError where its bundle lies outside the experiment."""
        if raw.get("bundle") is not None and not {"..", ""}.isdisjoint(str(raw["bundle"]).split("/")):
            raise ValueError(f"the bundle {raw['bundle']!r} lies outside of the experiment")
        test, reweighted = (raw.get(name) and Scores.from_record(raw[name]) for name in ("test", "reweighted"))
        rest = {**raw, "test": None, "reweighted": None}
        seeds = raw.get("seeds") or {}
        if "test_accuracies" in seeds:  # written by release 0.1
            rest["seeds"] = {key.replace("test_accuracies", "test_scores"): seeds[key] for key in seeds}
        made: LeaderboardRow = from_plain(LeaderboardRow, rest)
        return replace(made, test=test, reweighted=reweighted)

    @property
    def constant(self) -> bool:
        """Whether its prediction is constant, the same for every image."""
        return self.embedding in CONSTANT_GUESSES

    @property
    def kind(self) -> str:
        """One word on the kind of embedding, such as `baseline`; '' for a pretrained network."""
        if self.apart:
            return self.apart
        if self.unseen_rows is not None:
            return "fine-tuned"
        return "baseline" if self.baseline else "untrained" if self.untrained else ""

    @property
    def sound(self) -> bool:
        """Whether the saved fit is as good as those of cross-validation, as far as is known."""
        return self.last_fit is None or self.last_fit.sound

    @property
    def surprise(self) -> Literal["above", "below"] | None:
        """On which side of its prediction interval the test accuracy lies; None if inside."""
        if self.test is None or self.expected_test is None:
            return None
        low, high = self.expected_test
        return "below" if self.test.accuracy < low else "above" if self.test.accuracy > high else None

    @property
    def marks(self) -> tuple[str, ...]:
        """Warnings on the fit and its test, a word or two each; the notes around the table say more."""
        fit, found = self.last_fit, list[str]()
        if fit is not None and (fit.tries > 1 or not fit.sound):
            found.append("refitted" if fit.sound else "bad fit")
        if fit is not None and (fit.warnings or fit.fold_warnings):
            found.append("warnings")
        return (*found, f"test {self.surprise}") if self.surprise else tuple(found)

    @property
    def note(self) -> str:
        """The kind and the marks."""
        return ", ".join(filter(None, [self.kind, *self.marks]))


@dataclass(frozen=True)
class Leaks:
    """Near-duplicates between training and test images or between folds, as the data audit finds them in one embedding.

    The audit searched `test_images` plus `train_images` of all `images`. `test` of the `test_images` are near-duplicates of a training
    image, `folds` of the `train_images` of one in another fold. `without` is each row's test score without these test images,
    `held_out` its out-of-fold score with and without these training images, higher being better.
    """

    embedding: str
    images: int
    test: int
    test_images: int
    folds: int
    train_images: int
    without: Mapping[str, float]
    held_out: Mapping[str, tuple[float, float]]

    def lines(self, rows: Sequence[LeaderboardRow], metric: Metric = ACCURACY) -> list[str]:
        """Return the warnings to show above the table.

        rows : the best row and, if different, the recommended one; metric : the metric of the test scores
        """
        unit = metric.percent

        def told(key: str, without: float, score: float) -> str:
            return f"{key} has {metric.title} {metric.text(without)}{unit} in place of {metric.text(score)}{unit}"

        tests, held_out = list[str](), list[str]()
        for row in rows:
            score = row.test.of(metric)[0] if row.test and row.key in self.without else None
            if score is not None:
                tests.append(told(row.key, self.without[row.key], metric.sign * score))
            whole, left = self.held_out.get(row.key, (np.nan, np.nan))
            if np.isfinite(left):
                held_out.append(told(row.key, left, whole))
        lines = []
        for count, of, what, scored, scores in (
            (self.test, f"{self.test_images:,} test", "a training image", "on the other test images", tests),
            (self.folds, f"{self.train_images:,} training", "one of another fold", "held out, without them,", held_out),
        ):
            if count:
                end = f"; {scored} {' and '.join(scores)}." if scores else "."
                lines.append(
                    f"Leak: {count:,} of {of} images {'is' if count == 1 else 'are'} nearly the same as {what}{end}"
                )
        if lines:
            lines.append(
                "The report shows the pairs. Give images that belong together the same `group`, a column of a manifest "
                "(path,label,group): groups are never parted."
            )
        looked = self.test_images + self.train_images
        if looked < self.images:
            lines.append(f"Near-duplicates were searched among {looked:,} of the {self.images:,} images.")
        return lines


@dataclass(frozen=True)
class Recommendation:
    """The recommended row and the paired comparisons behind it, in the tuned metric; made by `recommend`.

    `differences` are to the best row, for every row with out-of-fold predictions. `optimism` is that of selecting the best row,
    `trial_optimism` that of selecting the best trial in the best row's search, among the `finished_trials` that were fitted on every
    fold (None where unknown).
    """

    differences: tuple[Difference, ...]
    recommended: str
    reason: str
    optimism: Optimism | None = None
    trial_optimism: float | None = None
    finished_trials: int | None = None

    @property
    def advice(self) -> str:
        """The recommended row, and why."""
        return self.reason if self.reason.startswith("Use ") else f"Use {self.recommended}. {self.reason}"

    @property
    def no_evidence(self) -> tuple[str, ...]:
        """Keys of the rows with no evidence that they are worse than the best, which is included."""
        return tuple(row.key for row in self.differences if row.no_evidence)


def nested_choice(rows: Sequence[LeaderboardRow]) -> Nested | None:
    """Return the nested score of the whole search, in which each outer fold also selects the row by inner scores.

    None unless every row has nested scores with the same number of outer folds.
    """
    found = [row.nested for row in rows if row.nested is not None]
    if not found or len(found) < len(rows) or len({len(nested.outer) for nested in found}) > 1:
        return None
    inner, outer = (np.array([getattr(nested, name) for nested in found]) for name in ("inner", "outer"))
    chosen, fold = np.argmax(inner, axis=0), np.arange(inner.shape[1])
    return Nested(tuple(inner[chosen, fold].tolist()), tuple(outer[chosen, fold].tolist()))
