"""How stage three ends: what was chosen, and one comparison with stage two on the untouched test images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.embed.concat import open_features
from pipeline.embed.records import EmbeddingRecord
from pipeline.evaluation import ACCURACY, Paired, Predictions, counted, paired_answers
from pipeline.evaluation.leaderboard import LeaderboardRow
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.finetuning import ReturnPath, State, Task
from pipeline.finetuning.material import Choice, Parts
from pipeline.heads.tuning import Features, blocks
from pipeline.store import StoredRows


def progress_report(task: Task, trained: State, path: ReturnPath) -> dict[str, Any]:
    """Return what training did and what was chosen on the validation images."""
    return {
        "steps": trained.step,
        "minutes": trained.seconds / 60,
        "rate": task.settings.rate,
        "precision": task.precision,
        "source": trained.source if path.alpha > 0 else "hand-over",
        "alpha": path.alpha,
        "curve": [[alpha, *score] for alpha, score in zip(path.alphas, path.scores, strict=True)],
        "validation": {"start": path.scores[0][0], "end": path.scores[-1][0], "chosen": max(path.scores)[0]},
    }


def judge(
    files: Artifacts, choice: Choice, parts: Parts, predicted: NDArray[np.int64], minutes: float, seed: int
) -> dict[str, Any]:
    """Compare the fine-tuned network with stage two's best row, and with itself frozen, on the same test images.

    predicted : places in the classes, int64 of shape (n_test,)
    """
    third = predicted == parts.codes(parts.test)
    rows = {"best": choice.winner, **({"frozen": choice.frozen} if choice.frozen else {})}
    return {
        "embedding": choice.record.name,
        "images": {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)},
        "test": float(third.mean()),
        "comparisons": {name: _compared(files, row, parts, third, minutes, seed) for name, row in rows.items()},
    }


def _compared(
    files: Artifacts, row: LeaderboardRow, parts: Parts, third: NDArray[np.bool_], minutes: float, seed: int
) -> dict[str, Any]:
    """Return what one paired comparison with a row of stage two says; `third` : right or wrong, of shape (n_test,)."""
    second, units = _stage_two_correct(files, row, parts), parts.test.fold_groups()
    paired = compared(third, second, units, seed)
    return {
        "row": row.key,
        "test": float(second.mean()),
        "gain": {"difference": paired.difference, "interval": list(paired.interval), "p_value": paired.p_value},
        "verdict": verdict(paired, minutes, counted(len(third), units, "test images")),
    }


def compared(tuned: NDArray[np.bool_], other: NDArray[np.bool_], units: NDArray[np.int64] | None, seed: int) -> Paired:
    """Compare which test images two classifiers label right, shape (n,) each: tuned minus other.

    units : ndarray of shape (n,), int64: images of one group, or copies, share a number; None when all are independent
    """
    right = np.zeros(len(tuned), dtype=np.int64)
    a, b = (Predictions(right, np.where(correct, 0, 1), units=units) for correct in (tuned, other))
    return paired_answers(ACCURACY, a, b, seed)


def verdict(paired: Paired, minutes: float, images: str) -> str:
    """Say in one sentence whether fine-tuning was worth it: worth it, not worth it, or no evidence.

    As in the leaderboard, the interval and the exact test must both show it. images : how many, such as `360 test images`
    """
    low, high = paired.interval
    numbers = (
        f"{paired.difference:+.2%} on {images} (95 % interval {low:+.2%} to {high:+.2%}, p = {paired.p_value:.2g}) "
        f"for {minutes:.1f} minutes of training"
    )
    words = {1: "worth it", -1: "not worth it", 0: "no evidence that it helps"}
    return f"{words[paired.shown]}: {numbers}"


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result in the words a user needs."""
    validation = result["validation"]
    return [
        f"start      {result['start']}",
        f"chosen     {result['source']}, alpha {result['alpha']:g}: {validation['chosen']:.2%} on validation, {validation['start']:.2%} at the start",
        f"test       {result['test']:.2%} fine-tuned",
        *_verdict_lines(result["comparisons"]),
        *(
            ["           nothing that was learned helped on the validation images: the network is the start"]
            if not result["alpha"]
            else []
        ),
    ]


def _verdict_lines(comparisons: Mapping[str, Any]) -> list[str]:
    """A line for each comparison, with the row and its score; one line where both are with the same row."""
    named = {"best": "the best row", "frozen": "the same network frozen"}
    if "frozen" in comparisons and comparisons["frozen"]["row"] == comparisons["best"]["row"]:
        comparisons, named = {"both": comparisons["best"]}, {"both": "the best row, which is the same network frozen"}
    lines = [f"{named[name]}, {one['row']} ({one['test']:.2%}): {one['verdict']}" for name, one in comparisons.items()]
    return [f"{'' if place else 'verdict':<10} against {line}" for place, line in enumerate(lines)]


def _stage_two_correct(files: Artifacts, winner: LeaderboardRow, parts: Parts) -> NDArray[np.bool_]:
    """Which test images stage two's best row labels right, in the order of `parts.test`."""
    bundle = bundles.load(files.root / str(winner.bundle))
    if not bundle.embedding:  # a constant guess needs no features
        X: Features = np.zeros((len(parts.test), 1), dtype=np.float32)
    else:
        X = StoredRows.of(open_features(EmbeddingRecord.from_dict(bundle.embedding), files), parts.test.digests)
    labels = np.concatenate([bundle.predict(block)[0] for _, block in blocks(X)])
    return np.asarray(labels == parts.test.labels, dtype=bool)
