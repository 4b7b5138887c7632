"""MAML with the inner loop on the head alone (ANIL; Finn et al. 2017, Raghu et al. 2020), on stored features.

The network is frozen, so what is learned across tasks is what lies between it and the head, a weight for each feature, and the
rate of each inner step. The head itself starts at zero: the classes of an episode come in any order, so the best common start has
the same row for each of them, which a softmax does not see (Kao et al. 2022). Gradients are of second order, through the inner steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.fewshot.episodes import Division, Images, draw
from pipeline.evaluation.fewshot.methods import Array, products, share_right

if TYPE_CHECKING:
    import torch

INNER_STEPS = 10
META_STEPS, BATCH, EVERY = 100, 4, 25
"""Outer steps, tasks in each, and after how many the held-out classes are asked."""
QUERIES = 5
"""Of a class in a task that is learned from."""
TRIALS = 60
"""Tasks of held-out classes by which the number of outer steps is chosen."""
RATE = 0.01
"""Of Adam, in the outer loop."""


@dataclass(frozen=True)
class Learned:
    """What meta-learning found: `scale`, float32 of shape (dim,), a weight per feature; `rates`, shape (INNER_STEPS,)."""

    scale: NDArray[np.float32]
    rates: Array
    steps: int
    """Outer steps that the held-out classes chose; 0 where learning did not help them."""

    def scores(self, support: NDArray[np.float32], query: NDArray[np.float32], ways: int) -> Array:
        """Return scores of queries after the inner loop.

        support, query : features, float32 of shape (e, rows, dim); returns float64 of shape (e, n_queries, ways)
        """
        given = products(support * self.scale, query * self.scale, ways)
        import torch

        with torch.no_grad():
            tensors = [torch.from_numpy(part) for part in (given.support, given.query, given.one_hot, self.rates)]
            return np.asarray(_adapt(*tensors))


def learn(images: Images, division: Division, ways: int, shots: int, rng: np.random.Generator) -> Learned | None:
    """Meta-learn on tasks of the base classes; None where their groups are too few to draw tasks from."""
    import torch
    from torch.nn.functional import cross_entropy

    width, width_held_out = min(ways, len(division.base)), min(ways, len(division.held_out))
    tasks = draw(images, division.base, width, shots, QUERIES, META_STEPS * BATCH, rng)
    trials = draw(images, division.held_out, width_held_out, shots, QUERIES, TRIALS, rng)
    if tasks is None or trials is None:
        return None
    X = torch.from_numpy(images.X)
    truth = torch.eye(width).repeat_interleave(shots, 0)
    answers = torch.arange(width).repeat_interleave(QUERIES).repeat(BATCH)
    scale = torch.zeros(X.shape[1], requires_grad=True)
    rates = torch.zeros(INNER_STEPS, requires_grad=True)  # both by their logarithm
    outer = torch.optim.Adam([scale, rates], RATE)
    best, found = -1.0, None
    for step in range(META_STEPS + 1):
        if step % EVERY == 0:
            reached = Learned(scale.detach().exp().numpy(), rates.detach().exp().double().numpy(), step)
            on_trials = share_right(
                reached.scores(images.X[trials.support], images.X[trials.query], trials.ways)
            ).mean()
            if on_trials > best:
                best, found = on_trials, reached
        if step < META_STEPS:
            batch = slice(step * BATCH, (step + 1) * BATCH)
            support, query = (X[torch.from_numpy(rows[batch])] * scale.exp() for rows in (tasks.support, tasks.query))
            across = support.transpose(1, 2)
            loss = cross_entropy(_adapt(support @ across, query @ across, truth, rates.exp()).flatten(0, 1), answers)
            outer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            outer.step()
    return found


def _adapt(support: torch.Tensor, query: torch.Tensor, truth: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Return the queries' scores after the inner loop: gradient steps of a softmax head, written in inner products.

    support : (e, n, n); query : (e, n_queries, n); truth : (n, ways), one-hot; rates : (steps,)
    """
    dual = support.new_zeros(len(support), *truth.shape)
    for rate in rates:
        dual = dual - rate * ((support @ dual).softmax(-1) - truth)
    return query @ dual
