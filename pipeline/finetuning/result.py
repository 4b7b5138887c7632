"""The result of a run: the interpolated weights that validation chose, their file, and the comparison with stage two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from pipeline.data.lineage import Lineage
from pipeline.embed.weights import DIGEST_KEY, METADATA_KEY, weights_digest
from pipeline.evaluation import ACCURACY, HeadPredictions, Paired, Predictions, counted, paired_answers
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import MADE_BY, Artifacts, made_by
from pipeline.finetuning.batches import Data, Score
from pipeline.finetuning.material import Choice, Parts
from pipeline.finetuning.trainer import TrainingTask, Weights, copy_weights, evaluate
from pipeline.io.files import make_folder, write_atomic

FORMAT = "manyheads weights"
VERSION = 1

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Interpolation coefficients tried first; then half a step on either side of the best."""
RETURN_EVALUATIONS = len(ALPHAS) + 1
"""Largest number of evaluations: two more for the refinement, minus the end, which was evaluated in training."""


# ---- interpolation between hand-over and result, chosen on the validation images


@dataclass(frozen=True)
class ReturnPath:
    """Validation scores between hand-over (alpha 0) and result (alpha 1), and the chosen alpha."""

    alphas: tuple[float, ...]
    scores: tuple[Score, ...]
    alpha: float
    weights: Weights


def return_path(
    task: TrainingTask, data: Data, start: Weights, end: Weights, end_score: Score | None = None
) -> ReturnPath:
    """Evaluate weights interpolated between two states of a network, more finely around the best, and load the best into the network.

    The smallest alpha wins ties, so weights move away from the hand-over only for a better score, and the chosen weights are never
    worse than the hand-over on these images. Wortsman et al. 2022, "Robust fine-tuning" (WiSE-FT), there for CLIP.

    end_score : the score of `end`, if known
    """
    scores: dict[float, Score] = {} if end_score is None else {1.0: end_score}

    def best_of(alphas: Iterable[float]) -> float:
        for alpha in alphas:
            if 0 <= alpha <= 1 and alpha not in scores:
                task.network.load_state_dict(interpolate(start, end, alpha))
                scores[alpha] = evaluate(task.network, data.validation, data, task.device, task.precision)
        return max(scores, key=lambda alpha: (scores[alpha], -alpha))

    near, half = best_of(ALPHAS), ALPHAS[1] / 2
    best = best_of((near - half, near + half))
    task.network.load_state_dict(interpolate(start, end, best))
    alphas = tuple(sorted(scores))
    return ReturnPath(alphas, tuple(scores[alpha] for alpha in alphas), best, copy_weights(task.network))


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> Weights:
    """Return `(1 - alpha) * start + alpha * end` of each tensor, in its shape and dtype; integer buffers are those of `start`."""
    return {
        name: torch.lerp(tensor, end[name], alpha) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in start.items()
    }


# ---- the weights file, which `embed` can load


def write_weights(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    name: str,
    architecture: str,
    arguments: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    classes: Sequence[str],
    lineage: Lineage | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write a weights file atomically, and return the description in it: how to build its network, and the origin of the weights.

    `preprocessing` has the keys of that section of a config; `lineage` names the images that the weights were trained on, on
    which their features must not be cross-validated. Shapes and dtypes of tensors stay as they are.
    """
    description = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "architecture": architecture,
        "arguments": {**arguments, "num_classes": len(classes)},
        "preprocessing": dict(preprocessing),
        "classes": list(classes),
        "trained_on": None if lineage is None else lineage.digest,
        **more,
    }
    tensors = {key: tensor.contiguous() for key, tensor in weights.items()}
    header = {METADATA_KEY: json.dumps({**description, MADE_BY: made_by()}, ensure_ascii=False)}
    header |= {} if lineage is None else lineage.header()
    make_folder(path.parent)
    write_atomic(path, save(tensors, {**header, DIGEST_KEY: weights_digest(tensors, header)}))
    return description


# ---- the verdict: a comparison with stage two on the untouched test images


def judge(
    files: Artifacts, choice: Choice, parts: Parts, said: NDArray[np.int64], minutes: float, seed: int
) -> dict[str, Any]:
    """Compare the fine-tuned network with stage two's best row, and with itself frozen, on the same test images.

    said : the network's predictions for the test images, encoded by the target, int64 of shape (n_test,)
    """
    tuned = Predictions(parts.target.encode(parts.test), said, units=parts.test.fold_groups())
    images, found = counted(len(tuned), tuned.units, "test images"), {}
    for name, row in {"best": choice.winner, "frozen": choice.frozen}.items():
        if row is not None:
            test = HeadPredictions.read(files.root / str(row.bundle) / FILE_NAME).test
            place = {path: number for number, path in enumerate(np.asarray(test.paths).tolist())}
            its = test.predicted[[place[str(path)] for path in parts.test.paths]]
            other = Predictions.of(parts.test.labels, its, parts.target.classes, units=tuned.units)
            paired = paired_answers(ACCURACY, tuned, other, seed)
            found[name] = {
                "row": row.key,
                "test": ACCURACY.score(other),
                "gain": {"difference": paired.difference, "interval": list(paired.interval), "p_value": paired.p_value},
                "verdict": verdict(paired, minutes, images),
            }
    return {
        "embedding": choice.record.name,
        "images": {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)},
        "test": ACCURACY.score(tuned),
        "comparisons": found,
        "transfer": transfer(files, choice, seed),
    }


def transfer(files: Artifacts, choice: Choice, seed: int, held_out: bool = False) -> str:
    """Return whether pretraining helps or hurts: compares the frozen features with the best row without pretraining on the same images.

    The images are those of the test, or with `held_out` the training images, predicted out of fold. '' if the network itself
    is untrained or there is no such row.
    """
    if choice.frozen is None or choice.floor is None or choice.frozen.untrained:
        return ""
    both = [HeadPredictions.read(files.root / str(row.bundle) / FILE_NAME) for row in (choice.frozen, choice.floor)]
    a, b = (each.out_of_fold if held_out else each.test for each in both)
    if a is None or b is None or not np.array_equal(a.paths, b.paths):  # type: ignore[arg-type]
        return ""
    paired = paired_answers(ACCURACY, a, b, seed)
    words = {1: "pretraining helps", -1: "negative transfer", 0: "no evidence that pretraining helps"}[paired.shown]
    return (
        f"{words}: {choice.frozen.key} ({ACCURACY.score(a):.2%}) against {choice.floor.key} ({ACCURACY.score(b):.2%}), the best without "
        f"any, {_told(paired, counted(len(a), a.units, 'training images' if held_out else 'test images'))}"
    )


def verdict(paired: Paired, minutes: float, images: str) -> str:
    """Say in one sentence whether fine-tuning was worth it: worth it, not worth it, or no evidence.

    As on the leaderboard, the interval and the exact test must both show it. images : their number, such as `360 test images`
    """
    words = {1: "worth it", -1: "not worth it", 0: "no evidence that it helps"}[paired.shown]
    return f"{words}: {_told(paired, images)} for {minutes:.1f} minutes of training"


def _told(paired: Paired, images: str) -> str:
    low, high = paired.interval
    return f"{paired.difference:+.2%} on {images} (95 % interval {low:+.2%} to {high:+.2%}, p = {paired.p_value:.2g})"


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result as lines for the user: one per comparison, or a single one if both are with the same row."""
    validation, comparisons = result["validation"], result["comparisons"]
    named = {"best": "the best row", "frozen": "the same network frozen"}
    if "frozen" in comparisons and comparisons["frozen"]["row"] == comparisons["best"]["row"]:
        comparisons, named = {"both": comparisons["best"]}, {"both": "the best row, which is the same network frozen"}
    against = [
        f"{named[name]}, {one['row']} ({one['test']:.2%}): {one['verdict']}" for name, one in comparisons.items()
    ]
    found = [
        f"start      {result['start']}",
        f"chosen     alpha {result['alpha']:g}: {validation['chosen']:.2%} on validation, {validation['start']:.2%} at the start",
        f"test       {result['test']:.2%} fine-tuned",
        *(f"{'' if place else 'verdict':<10} against {line}" for place, line in enumerate(against)),
    ]
    if result["transfer"]:
        found.append(f"transfer   {result['transfer']}")
    if not result["alpha"]:
        found.append("           training did not help on the validation images: the result equals the start")
    return found
