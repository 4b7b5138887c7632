"""Embedder: images to vectors as a transformer of scikit-learn's, with the feature stores behind it.

It holds its parameters alone. The network is loaded when an image is met that the store does not know, once in each process.
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
"""Where experiments keep their vectors, unless their configs say otherwise."""

NETWORKS = 2
"""Networks that a process keeps loaded."""

MOST_NAMED = 20
"""Images that cannot be used of which a message says each by its name."""

_BUSY = threading.RLock()
"""Of the threads of this process one at a time loads a network, or embeds with it."""

Images = Sequence[str | Pixels]
Problems = dict[int, ImageProblem]
"""By the number of the image."""


class Embedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A frozen network, or one of the baselines `pixels` and `hog`, from images to vectors.

    Parameters
    ----------
    name, weights, arguments : as in a config's `backbones`; `weights` may be left out where there is one kind
    layer, pooling : which output is kept, and how it becomes one vector, by the words of `layers` and `pooling` there
    preprocessing : a mapping with the keys of a config's `preprocessing`; by default what belongs to the weights
    view : one of a config's `views`, which takes the place of the image
    precision, engine, decode, device : as in a config's `extraction`; the engine is torch unless asked for
    max_pixels : the most that an image may have
    seed : of weights that are `random`
    store : the folder of feature stores in which vectors are kept and found by the content of their images, whoever made
        them: another pipeline, fold or process, or an experiment; None keeps nothing
    fingerprint : the digest of the identity that vectors must have, such as that a head was fitted on; another is refused
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
        """Check the parameters; there is nothing to learn, and no image is looked at."""
        self._asked()
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Return the vectors of n images, float32 of shape (n, dim).

        DatasetError with every image that cannot be used; the vectors of the others are in the store by then.

        X : a path, a PIL image, or an array of shape (height, width) or (height, width, 3), uint8; or a sequence of these
        """
        images = one_by_one(X)
        vectors, problems = self.embed(images)
        if problems:
            told = [f"{_name(images, number)}: {problem.reason}" for number, problem in sorted(problems.items())]
            raise DatasetError(
                f"{len(problems):,} of {number_of(len(images), 'image')} cannot be used; mend them, or leave them out",
                first(told, MOST_NAMED),
            )
        return vectors

    def embed(self, images: Images) -> tuple[NDArray[np.float32], Problems]:
        """Return the vectors of those of some images that can be used, float32 of shape (k, dim), and why the others cannot."""
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
        """Return a name for each number of a vector, such as `efficientnet_lite0_7`: object (str) of shape (dim,)."""
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
        """Return a config of this one embedding, and the section of its network, None of a baseline; ConfigError with all that is wrong."""
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
        asked = config.sections[-1]  # the view, where one is asked for
        other = published.stand_in(asked)
        if other is not None:
            warnings.warn(published.about_stand_in(asked), stacklevel=1)
        return config, other or asked

    def _spec(self) -> EmbeddingSpec:
        """Return what its vectors are, without its network where the store's folder knows it already."""
        config, section = self._asked()
        if section is None or self.store is None or names_code(section.name):
            (spec,) = self._network().specs
        else:
            path, key = Artifacts(self.store, self.store).specs, spec_key(section, config)
            known = read_specs(path)
            if key not in known:
                known[key] = self._network().specs
                with contextlib.suppress(OSError):  # a folder that is only read
                    write_specs(path, known)
            (spec,) = known[key]
        if self.fingerprint not in (None, spec.fingerprint()):
            raise BackboneError(f"{spec.name}: its vectors are not those of the head now; run `manyheads heads` again")
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
        """Yield numbers of images, int64 of shape (k,), and their vectors, float32 of shape (k, dim), in batches; note problems.

        digests : of n images, uint64 of shape (n, 2), which files must have
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
        """Embed images by their numbers, int64 of shape (k,), each content once; digests of all n, uint64 of shape (n, 2)."""
        if other := lock.holder(path):
            log.warning("%s: waiting for %s, which writes to it", path, other)
        writing = StoreWriter.open(path, spec.identity(), spec.dim, probe=self._network().probe[0], patience=math.inf)
        hashing: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        with contextlib.suppress(StoreError):  # of another process that writes perceptual hashes, which find copies
            hashing = StoreWriter.open(path.parent / HASH_STORE, HASH_IDENTITY, HASH_BYTES, "float16", patience=1.0)
        with writing as writer, hashing as hashes:
            numbers = missing[writer.fresh(digests[missing])]  # another process may have embedded some meanwhile
            try:
                for here, vectors in self._embed(images, numbers.tolist(), problems, digests, hashes):
                    finite = storable(vectors, writer.store_type)
                    problem = ImageProblem("not_finite", f"{spec.name} gives it a vector that is not finite")
                    problems |= dict.fromkeys(here[~finite].tolist(), problem)
                    writer.append(digests[here[finite]], vectors[finite])
            finally:  # also after Ctrl-C: what was embedded is not to be embedded again
                for each in filter(None, (hashes, writer)):
                    each.commit()
        broken = {digests[number].tobytes(): problem for number, problem in problems.items()}
        again = {number: broken.get(digests[number].tobytes()) for number in missing.tolist()}
        problems |= {number: problem for number, problem in again.items() if problem}


def digests_of(images: Images, max_pixels: int) -> tuple[Digests, Problems]:
    """Return the digests that name the contents of n images, uint64 of shape (n, 2), and which cannot be read, and why."""
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
    """Load a network, or a baseline, of the JSON of its sections; `key` is of all that it depends on."""
    asked = BackboneConfig.model_validate_json(section) if section else None
    return load(asked, baseline, ExtractionConfig.model_validate_json(extraction), seed)


def _usual_weights(name: str) -> str | None:
    """Return the weights of a network that has one kind, None where its name says which; BackboneError for one that has several."""
    if name in published.SHA256:
        return published.IMAGENET
    if name in baselines.NAMES or names_timm(name) or names_code(name):
        return None
    from pipeline.embed.weights import family_of  # loads torch

    found = list(family_of(name).weights(name))
    if len(found) == 1:
        return found[0]
    raise BackboneError(f"{name} has several weights; say which, such as weights={found[-1]!r}: {', '.join(found)}")
