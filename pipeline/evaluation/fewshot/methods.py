"""What learns a task from its support images, one row each: scores of the queries from inner products alone.

Features are centred and of length 1 (Wang et al. 2019), so an inner product is a cosine. A method is given all inner products of
many episodes at once and has nothing to tune: with one image per class there is nothing to tune on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

Array = NDArray[np.float64]

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of the nearest-neighbour vote: Caron et al. 2021 (DINO); with all neighbours it is Vinyals et al. 2016."""
C = 10.0
"""Of logistic regression, as scikit-learn has it; on features of length 1 its default of 1 is a strong penalty."""


@dataclass(frozen=True)
class Products:
    """Inner products of e episodes, the rows of a class one behind the other.

    support : of the n support images with one another, (e, n, n); query : of the queries with them, (e, n_queries, n)
    """

    support: Array
    query: Array
    ways: int

    @property
    def shots(self) -> int:
        """Support images of a class."""
        return int(self.support.shape[1]) // self.ways

    @property
    def one_hot(self) -> Array:
        """The class of each support image, 1 in its column, float64 of shape (n, ways)."""
        return np.repeat(np.eye(self.ways), self.shots, axis=0)


def products(support: NDArray[np.float32], query: NDArray[np.float32], ways: int) -> Products:
    """Return the inner products of support and queries.

    support : float32 of shape (e, n, dim); query : float32 of shape (e, n_queries, dim); the products are float64
    """
    across = support.transpose(0, 2, 1)
    return Products((support @ across).astype(np.float64), (query @ across).astype(np.float64), ways)


def share_right(scores: Array) -> Array:
    """Return the share of right answers of each episode, shape (e,), to queries that come class by class.

    scores : float64 of shape (e, n_queries, ways); returns float64
    """
    _, queries, ways = scores.shape
    return np.asarray((scores.argmax(axis=-1) == np.repeat(np.arange(ways), queries // ways)).mean(axis=1))


def cosine_prototypes(given: Products) -> Array:
    """Cosine with the mean of each class.

    Returns scores of the queries, float64 of shape (e, n_queries, ways).
    """
    return _to_means(given) / np.sqrt(_means(given))[:, None]


def nearest_centroid(given: Products) -> Array:
    """Squared distance to the mean of each class, as in prototypical networks (Snell et al. 2017), without the queries' own length.

    Returns scores of the queries, float64 of shape (e, n_queries, ways).
    """
    return 2 * _to_means(given) - _means(given)[:, None]


def knn(given: Products) -> Array:
    """Vote of the nearest by cosine, weighted by its exponential.

    Returns scores of the queries, float64 of shape (e, n_queries, ways).
    """
    cosine = given.query
    least = np.sort(cosine, axis=-1)[..., -min(NEIGHBOURS, cosine.shape[-1]), None]
    return np.where(cosine >= least, np.exp((cosine - 1) / TEMPERATURE), 0.0) @ given.one_hot


def logistic_regression(given: Products, tolerance: float = 1e-3, most: int = 500) -> Array:
    """Multinomial, penalised by 1 / C, without intercept: scikit-learn's optimum, for all episodes at once.

    Steps by the fixed bound on the Hessian of Böhning 1992, which never overshoot; until no coefficient's derivative is above
    `tolerance`.

    Returns scores of the queries, float64 of shape (e, n_queries, ways).
    """
    gram, truth = given.support, given.one_hot
    bound = np.linalg.inv(gram / 2 + np.eye(gram.shape[1]) / C)
    dual = np.zeros((len(gram), *truth.shape))
    for _ in range(most):
        slope = softmax(gram @ dual, axis=-1) - truth + dual / C
        if np.abs(slope).max() < tolerance:
            break
        dual -= bound @ slope
    return given.query @ dual


def _to_means(given: Products) -> Array:
    """Inner products of queries with the mean of each class, shape (e, n_queries, ways)."""
    return given.query @ given.one_hot / given.shots


def _means(given: Products) -> Array:
    """The squared length of the mean of each class, shape (e, ways)."""
    blocks = given.support.reshape(-1, given.ways, given.shots, given.ways, given.shots)
    return np.asarray(np.einsum("ewiwj->ew", blocks) / given.shots**2)


METHODS: Mapping[str, Callable[[Products], Array]] = {
    method.__name__: method for method in (logistic_regression, cosine_prototypes, nearest_centroid, knn)
}
"""By name: inner products -> scores of the queries, shape (e, n_queries, ways), the highest is the answer."""
PLAIN = logistic_regression.__name__
"""What every other is compared with."""
