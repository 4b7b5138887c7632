"""One point of the curve: every method on the same episodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pipeline.evaluation.fewshot import maml
from pipeline.evaluation.fewshot.episodes import LEAST_BASE, Episodes, Images, Plan, divide, draw
from pipeline.evaluation.fewshot.methods import METHODS, Array, products, share_right
from pipeline.evaluation.strangeness import directions

MAML = "maml"
MOST_NUMBERS = 1 << 24
"""Of features that are looked at at once."""


def measure(images: Images, plan: Plan, shots: int) -> tuple[Mapping[str, Array], list[str]]:
    """Return by method the share of right answers in each episode, and what is to be said of it.

    Nothing but a line where there are too few images for so many shots. The shares are float64 of shape (episodes,).
    """
    classes, found = images.classes_of(shots + plan.queries), defaultdict[str, list[Array]](list)
    if len(classes) < plan.ways:
        return {}, [
            f"K = {shots} is left out: {len(classes)} classes have {shots} + {plan.queries} images, and {plan.ways} are needed."
        ]
    rng = np.random.default_rng([plan.seed, shots])
    # The same division for every number of shots, or the curve would go up and down with it.
    divisions, notes = divide(classes, plan.ways, np.random.default_rng(plan.seed)), list[str]()
    every = len(images.classes_of(1))
    if len(classes) < every:
        notes.append(f"K = {shots}: {len(classes)} of {every} classes have {shots} + {plan.queries} images.")
    if not len(divisions[0].base):
        notes.append(_no_maml(len(classes), plan.ways))
    for part, division in zip(np.array_split(np.arange(plan.episodes), len(divisions)), divisions, strict=True):
        base = np.isin(images.y, division.base)
        normal = replace(images, X=directions(images.X, images.X[base].mean(axis=0) if base.any() else 0.0))
        episodes = draw(normal, division.novel, plan.ways, shots, plan.queries, len(part), rng)
        if episodes is None:
            return {}, [
                f"K = {shots} is left out: the images of a class are in too few groups to part {shots} from the rest."
            ]
        learned = maml.learn(normal, division, plan.ways, shots, rng) if len(division.base) else None
        for name, right in _answers(normal, episodes, learned).items():
            found[name].append(right)
    if len(found.get(MAML, divisions)) < len(divisions):
        del found[MAML]
        notes.append(f"K = {shots}: no MAML, as the images of a class are in too few groups to learn on.")
    return {name: np.concatenate(parts) for name, parts in found.items()}, notes


def _no_maml(classes: int, ways: int) -> str:
    fewer = classes - LEAST_BASE
    return (
        f"No MAML: it learns on {LEAST_BASE} classes at least beside the {ways} of an episode, and {classes} have enough images"
        + (f"; --ways {fewer} leaves it that many." if fewer > 1 else ".")
    )


def _answers(images: Images, episodes: Episodes, learned: maml.Learned | None) -> dict[str, Array]:
    """Return the share of right answers of each method in each episode, block by block."""
    rows = episodes.support.shape[1] + episodes.query.shape[1]
    block = max(1, MOST_NUMBERS // (rows * images.X.shape[1]))
    found = defaultdict[str, list[Array]](list)
    for start in range(0, len(episodes.support), block):
        support, query = (images.X[part[start : start + block]] for part in (episodes.support, episodes.query))
        given = products(support, query, episodes.ways)
        said = {name: method(given) for name, method in METHODS.items()}
        if learned is not None:
            said[MAML] = learned.scores(support, query, episodes.ways)
        for name, scores in said.items():
            found[name].append(share_right(scores))
    return {name: np.concatenate(parts) for name, parts in found.items()}
