"""Embedder: images to vectors as a scikit-learn transformer, cached in feature stores.

It holds only its parameters. The network is loaded at the first image that is missing in the store, once per process.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags

from pipeline import config as configuration
from pipeline.config import BackboneConfig, Config, DatasetConfig, ExtractionConfig, names_code, names_timm
from pipeline.embed import baselines, published
from pipeline.embed import spec as specs
from pipeline.embed.engines import choose_batch_size
from pipeline.embed.loader import Item, Lane, embed
from pipeline.embed.records import load, open_store, place, read_specs, spec_key, write_specs
from pipeline.embed.spec import EmbeddingSpec, embedding_name
from pipeline.errors import BackboneError, DatasetError, StoreError, first, number_of
from pipeline.experiment import STORES, Artifacts
from pipeline.images import HASH_BYTES, HASH_IDENTITY, HASH_STORE, ImageProblem
from pipeline.images.reading import Pixels, given_key, one_by_one
from pipeline.io.digests import Digests
from pipeline.io.remote import absolute
from pipeline.store import lock
from pipeline.store.writer import StoreWriter, storable

log = logging.getLogger(__name__)

STORE = f"artifacts/{STORES}"
"""The default folder of experiments' feature stores."""

NETWORKS = 2
"""Number of networks that a process keeps loaded."""

MOST_NAMED = 20
"""Number of unusable images that a message names individually."""

_BUSY = threading.RLock()
"""Lets only one thread of this process load a network or embed at a time."""

Images = Sequence[str | Pixels]
Problems = dict[int, ImageProblem]
"""By the number of the image."""


class Embedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A transformer from images to vectors by a frozen network, or by one of the baselines `pixels` and `hog`.

    Parameters
    ----------
    name, weights, arguments : as in a config's `backbones`; `weights` may be omitted if there is only one kind
    layer, pooling : the layer to embed and its pooling, as in `layers` and `pooling` of a config
    preprocessing : a mapping with the keys of a config's `preprocessing`; by default the transform of the weights
    view : one of a config's `views`, which is embedded in place of the image
    precision, engine, decode, device : as in a config's `extraction`, but with torch as the default engine
    max_pixels : the largest number of pixels that an image may have
    seed : the seed of `random` weights
    store : the folder of feature stores, which cache vectors by the content of images and are shared with other pipelines,
        folds, processes and experiments; None disables the cache
    fingerprint : the required digest of the embedding's identity, such as that of a head's training; another is refused
    """

    def __init__(
        self,
        name: str = published.DEFAULT.name,
        *,
        weights: str | None = None,
        layer: str = "penultimate",
        pooling: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        view: str | None = None,
        precision: str = "auto",
        engine: str = "torch",
        decode: str = "standard",
        device: str = "auto",
        max_pixels: int = DatasetConfig().max_pixels,
        seed: int = 0,
        store: str | Path | None = STORE,
        fingerprint: str | None = None,
    ) -> None:
        self.name = name
        self.weights = weights
        self.layer = layer
        self.pooling = pooling
        self.arguments = arguments
        self.preprocessing = preprocessing
        self.view = view
        self.precision = precision
        self.engine = engine
        self.decode = decode
        self.device = device
        self.max_pixels = max_pixels
        self.seed = seed
        self.store = store
        self.fingerprint = fingerprint

    def fit(self, X: Any = None, y: Any = None) -> Embedder:
        """Check the parameters; X and y are ignored, as there is nothing to learn."""
        self._asked()
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Return the vectors of n images, float32 of shape (n, dim).

        DatasetError with every image that cannot be used; the vectors of the others are stored before.

        X : a path, a PIL image, or an array of shape (height, width) or (height, width, 3), uint8; or a sequence of these
        """
        images = one_by_one(X)
        vectors, problems = self.embed(images)
        if problems:
            reasons = [f"{_name(images, number)}: {problem.reason}" for number, problem in sorted(problems.items())]
            raise DatasetError(
                f"{len(problems):,} of {number_of(len(images), 'image')} cannot be used; repair or omit them",
                first(reasons, MOST_NAMED),
            )
        return vectors

    def embed(self, images: Images) -> tuple[NDArray[np.float32], Problems]:
        """Return the vectors of the k usable images, float32 of shape (k, dim), and the problems of the others."""
        problems = Problems()
        with _BUSY:
            spec = self._spec()
            if self.store is None:
                parts = [vectors for _, vectors in self._embed(images, range(len(images)), problems)]
                return np.concatenate([np.empty((0, spec.dim), np.float32), *parts]), problems
            path = place(spec, Artifacts(self.store, self.store))
            digests: Digests = np.zeros((len(images), 2), np.uint64)
            for number, image in enumerate(images):
                try:
                    digests[number] = np.frombuffer(given_key(image, self.max_pixels), "<u8")
                except ImageProblem as problem:
                    problems[number] = problem
            store = open_store(path, spec.fingerprint())
            missing = np.ones(len(images), bool) if store is None else store.missing(digests)
            missing[list(problems)] = False
            if missing.any():
                self._fill(path, spec, images, digests, np.flatnonzero(missing), problems)
                store = open_store(path, spec.fingerprint())
            usable = np.ones(len(images), bool)
            usable[list(problems)] = False
            vectors = np.empty((0, spec.dim), np.float32) if store is None else store.read(digests[usable])
        return vectors, problems

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return a name for each feature, such as `efficientnet_lite0_7`: object (str) of shape (dim,)."""
        return np.array([f"{embedding_name(self.name)}_{number}" for number in range(self._spec().dim)], dtype=object)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.two_d_array, tags.input_tags.one_d_array, tags.input_tags.string = False, True, True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def _asked(self) -> tuple[Config, BackboneConfig | None]:
        """Return the config of this embedding, and its section, None for a baseline; ConfigError with all problems."""
        weights = _usual_weights(self.name) if self.weights is None and isinstance(self.name, str) else self.weights
        section = {"name": self.name, "layers": [self.layer], "weights": weights}
        section |= {word: getattr(self, word) for word in ("pooling", "preprocessing", "arguments")}
        section["views"] = None if self.view is None else [self.view]
        raw = {
            "backbones": [{key: value for key, value in section.items() if value is not None}],
            "extraction": {word: getattr(self, word) for word in ("device", "precision", "engine", "decode")},
            "dataset": {"max_pixels": self.max_pixels},
            "seed": self.seed,
        }
        config = configuration.parse(raw, type(self).__name__)
        if self.name in baselines.NAMES:
            return config, None
        asked = config.sections[-1]  # the view, if there is one
        other = published.stand_in(asked)
        if other is not None:
            warnings.warn(published.about_stand_in(asked), stacklevel=1)
        return config, other or asked

    def _spec(self) -> EmbeddingSpec:
        """Return the spec of the embedding, from the cache in the store's folder if possible, else by loading the network."""
        config, section = self._asked()
        if section is None or self.store is None or names_code(section.name):
            (spec,) = self._network().specs
        else:
            path, key = Artifacts(self.store, self.store).specs, spec_key(section, config)
            known = read_specs(path)
            if key not in known:
                known[key] = self._network().specs
                with contextlib.suppress(OSError):  # the folder may be read-only
                    write_specs(path, known)
            (spec,) = known[key]
        if self.fingerprint not in (None, spec.fingerprint()):
            raise BackboneError(f"{spec.name}: its vectors differ from those of the head; run `manyheads heads` again")
        return spec

    def _network(self) -> specs.EmbeddingModel:
        config, section = self._asked()
        key, text = ("", "") if section is None else (spec_key(section, config), section.model_dump_json())
        return _loaded(key, text, self.name, config.extraction.model_dump_json(), config.seed)

    def _embed(
        self,
        images: Images,
        numbers: Iterable[int],
        problems: Problems,
        digests: Digests | None = None,
        hashes: StoreWriter | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield batches of image numbers, int64 of shape (k,), and vectors, float32 of shape (k, dim); add to `problems`.

        digests : the required digests of n images, uint64 of shape (n, 2)
        """
        network = self._network()
        lane = Lane(network, choose_batch_size("auto", str(network.device)))
        items = (
            Item(number, absolute(image), None if digests is None else digests[number].tobytes(), (0,))
            if isinstance(image := images[number], str)
            else Item(number, "", None, (0,), image)
            for number in numbers
        )
        for batch, (part,) in embed([lane], items, Path("/"), self.max_pixels, hashed=hashes is not None):
            contents = np.array([item.content for item in batch.items])
            problems |= {int(contents[row]): problem for row, problem in batch.problems.items()}
            if hashes is not None and digests is not None:
                batch.store_hashes(hashes, digests)
            if part is not None:
                yield contents[part.rows], part.vectors[0]

    def _fill(
        self,
        path: Path,
        spec: EmbeddingSpec,
        images: Images,
        digests: Digests,
        missing: NDArray[np.int64],
        problems: Problems,
    ) -> None:
        """Embed and store the images with numbers `missing`, int64 of shape (k,), each content once; digests : uint64 of shape (n, 2)."""
        if other := lock.holder(path):
            log.warning("%s: waiting for %s, which writes to it", path, other)
        writing = StoreWriter.open(path, spec.identity(), spec.dim, probe=self._network().probe[0], patience=math.inf)
        hashing: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        with contextlib.suppress(StoreError):  # another process may be writing perceptual hashes
            hashing = StoreWriter.open(path.parent / HASH_STORE, HASH_IDENTITY, HASH_BYTES, "float16", patience=1.0)
        with writing as writer, hashing as hashes:
            numbers = missing[writer.fresh(digests[missing])]  # another process may have embedded some in the meantime
            try:
                for done, vectors in self._embed(images, numbers.tolist(), problems, digests, hashes):
                    finite = storable(vectors, writer.store_type)
                    problem = ImageProblem("not_finite", f"{spec.name} gives it a vector that is not finite")
                    problems |= dict.fromkeys(done[~finite].tolist(), problem)
                    writer.append(digests[done[finite]], vectors[finite])
            finally:  # also after Ctrl-C, to keep what was embedded
                for each in filter(None, (hashes, writer)):
                    each.commit()
        broken = {digests[number].tobytes(): problem for number, problem in problems.items()}
        again = {number: broken.get(digests[number].tobytes()) for number in missing.tolist()}
        problems |= {number: problem for number, problem in again.items() if problem}


def digests_of(images: Images, max_pixels: int) -> tuple[Digests, Problems]:
    """Return the content digests of n images, uint64 of shape (n, 2), and the problems of unreadable ones."""
    digests, problems = np.zeros((len(images), 2), np.uint64), Problems()
    for number, image in enumerate(images):
        try:
            digests[number] = np.frombuffer(given_key(image, max_pixels), "<u8")
        except ImageProblem as problem:
            problems[number] = problem
    return digests, problems


def _name(images: Images, number: int) -> str:
    image = images[number]
    return image if isinstance(image, str) else getattr(image, "filename", "") or f"image {number}"


@lru_cache(maxsize=NETWORKS)
def _loaded(key: str, section: str, baseline: str, extraction: str, seed: int) -> specs.EmbeddingModel:
    """Load a network or baseline from its sections as JSON; `key` is the cache key of all that it depends on."""
    asked = BackboneConfig.model_validate_json(section) if section else None
    return load(asked, baseline, ExtractionConfig.model_validate_json(extraction), seed)


def _usual_weights(name: str) -> str | None:
    """Return the weights of a network with only one kind, None if its name implies them; BackboneError if there are several."""
    if name in published.SHA256:
        return published.IMAGENET
    if name in baselines.NAMES or names_timm(name) or names_code(name):
        return None
    from pipeline.embed.weights import family_of  # loads torch

    found = list(family_of(name).weights(name))
    if len(found) == 1:
        return found[0]
    raise BackboneError(f"{name} has several weights; choose, for example, weights={found[-1]!r}: {', '.join(found)}")
