"""The embeddings of a config and the images that each store is missing, determined before any work.

The specs of a section's embeddings are known only once its network has been loaded (the digest of its weights, the length of its
vectors). They are therefore stored in `specs.json` under a key of all that they depend on, so that the next run can find
out without loading a network that nothing is missing. `engine: auto` is thus decided once, by the images at that time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import BackboneConfig, Config, names_code, names_vectors
from pipeline.data import DatasetIndex, failed_digests
from pipeline.data.targets import CONSTANT_GUESSES
from pipeline.embed import baselines, published
from pipeline.embed.published import stand_in
from pipeline.embed.records import load, open_store, place, read_specs, spec_key, write_specs
from pipeline.embed.spec import EmbeddingModel, EmbeddingSpec
from pipeline.errors import StoreError, first
from pipeline.experiment import Artifacts
from pipeline.images import policy_key
from pipeline.io.digests import Digests, digest_keys
from pipeline.stages.extract.stores import others
from pipeline.store import FeatureStore, differences

MOST_DIFFERENCES = 6
IDENTITY_DIFFERS = "identity differs"


@dataclass(frozen=True)
class Source:
    """One backbone section or baseline."""

    section: BackboneConfig | None
    specs: tuple[EmbeddingSpec, ...]
    load: Callable[[], EmbeddingModel] = field(repr=False)
    """Return the live embedder; its network is loaded on first use."""
    instead_of: BackboneConfig | None = None
    """The config's section that `section` replaces."""

    def elsewhere(self, config: Config) -> Source:
        """Return a copy for another process, which loads the network itself."""
        extraction = config.extraction
        if self.section is not None:
            extraction = extraction.model_copy(update={"engine": self.specs[0].engine})
        make = partial(load, self.section, self.specs[0].architecture, extraction, config.seed)
        return replace(self, load=make, instead_of=None)


def require_permitted(config: Config) -> None:
    """Check that the config allows the licence of every section's weights, without loading or downloading them.

    BackboneError with one line per forbidden licence.
    """

    def license_of(section: BackboneConfig) -> str:
        from pipeline.embed import weights  # loads torch

        return published.UNKNOWN if names_vectors(section.name) else weights.license_of(section)

    published.require_permitted(config.licenses, ((each.title, license_of(each)) for each in config.backbones))


def resolve(config: Config, files: Artifacts, digests: Digests) -> list[Source]:
    """Return every source with its embeddings, under unique names.

    `digests` are the distinct images of the data set, uint64 of shape (n, 2). The engine is chosen by their number, unless another
    experiment has already embedded most of them. If the weights of a section are not installed, and never were when this
    experiment was embedded, its stand-in is embedded. BackboneError if a network that must be loaded
    is not available.
    """
    known = read_specs(files.specs)
    found = dict(known)
    sources = []
    for asked in config.sections:
        other = None if spec_key(asked, config) in known else stand_in(asked)
        other = other and other.model_copy(update={"view": asked.view})
        section, instead_of = (other, asked) if other else (asked, None)
        key = spec_key(section, config)
        if key not in known and (theirs := _specs_of_others(key, files, digests)):
            found[key] = theirs
        extraction = config.extraction
        if key in found:
            extraction = extraction.model_copy(update={"engine": found[key][0].engine})
        live: Callable[[], EmbeddingModel] = partial(load, section, "", extraction, config.seed, len(digests))
        if key not in found or names_code(section.name):  # the files that user code reads are unknown
            live = cache(live)
            found[key] = live().specs
        sources.append(Source(section, found[key], live, instead_of))
    for name in baselines.NAMES if config.baselines is None else config.baselines:
        if name not in CONSTANT_GUESSES:
            live = cache(partial(load, None, name, config.extraction, config.seed))
            sources.append(Source(None, live().specs, live))
    if found != known:
        write_specs(files.specs, found)
    return _with_unique_names(sources)


def _specs_of_others(key: str, files: Artifacts, digests: Digests) -> tuple[EmbeddingSpec, ...]:
    """Return another experiment's embeddings of the same section, if their stores have most of n images already.

    `digests` : uint64 of shape (n, 2).
    """
    for other in others(files)[0]:
        specs = read_specs(other.specs).get(key, ())
        stores = [open_store(place(spec, files), spec.fingerprint()) for spec in specs]
        if stores and all(store and 2 * int(store.missing(digests).sum()) <= len(digests) for store in stores):
            return specs
    return ()


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Append the start of the fingerprint to names shared by different embeddings."""
    distinct = {spec.fingerprint(): spec.name for source in sources for spec in source.specs}
    several = {name for name, count in Counter(distinct.values()).items() if count > 1}

    def named(spec: EmbeddingSpec) -> EmbeddingSpec:
        return replace(spec, name=f"{spec.name}-{spec.fingerprint()[:6]}") if spec.name in several else spec

    return [replace(source, specs=tuple(map(named, source.specs))) for source in sources]


@dataclass(frozen=True, eq=False)
class Contents:
    """n distinct images of a data set, in the order of the index."""

    digests: Digests
    rows: NDArray[np.int64]
    """The first row of the index with each content, shape (n,)."""
    paths: NDArray[np.object_]
    """The path of each under `root`, shape (n,)."""
    failed: NDArray[np.bool_]
    """Whether each is known not to decode, shape (n,)."""
    root: Path

    @staticmethod
    def of(index: DatasetIndex, files: Artifacts, config: Config) -> Contents:
        """Return the distinct contents of an experiment's index."""
        rows = np.sort(np.unique(index.digests, axis=0, return_index=True)[1]).astype(np.int64)
        digests = index.digests[rows]
        failed = failed_digests(files.dataset, policy_key(config.dataset.max_pixels))
        is_failed = np.isin(digest_keys(digests), digest_keys(failed))
        return Contents(digests, rows, index.paths[rows], is_failed, index.root)

    def part(self, chosen: NDArray[Any]) -> Contents:
        """Return some of them, selected by mask, bool of shape (n,), or by position, int64 of shape (k,)."""
        return Contents(self.digests[chosen], self.rows[chosen], self.paths[chosen], self.failed[chosen], self.root)


@dataclass(frozen=True, eq=False)
class EmbeddingTarget:
    """One embedding and the state of its store."""

    source: Source
    output: int
    """The index among the source's outputs."""
    spec: EmbeddingSpec
    path: Path
    pending: NDArray[np.bool_]
    """Which contents must be embedded, shape (n,)."""
    why: str
    """The reason why contents are missing; '' if none are."""


def find_targets(
    sources: Sequence[Source], contents: Contents, files: Artifacts, folders: Sequence[Path] = ()
) -> list[EmbeddingTarget]:
    """Compare every embedding's store with the data set; duplicate embeddings are merged into one target.

    `folders` : other folders to search for stores, for callers that only read.
    """
    targets: dict[Path, EmbeddingTarget] = {}
    for source, output, spec in ((one, *each) for one in sources for each in enumerate(one.specs)):
        path = place(spec, files, folders)
        if path in targets:
            continue
        store = open_store(path, spec.fingerprint())
        missing = np.ones(len(contents.rows), dtype=bool) if store is None else store.missing(contents.digests)
        pending = missing & ~contents.failed
        why = ""
        if count := int(pending.sum()):
            new = f"{count:,} images are new or changed since the store was filled"
            why = new if store and store.rows else _why_no_store(spec, files)
        targets[path] = EmbeddingTarget(source, output, spec, path, pending, why)
    return list(targets.values())


def _why_no_store(spec: EmbeddingSpec, files: Artifacts) -> str:
    """Return the differences between this identity and that of the most similar store."""
    found: list[tuple[int, str, list[str]]] = []
    for other in (each for folder in (files.stores, *files.stores_before()) for each in sorted(folder.glob("*.store"))):
        with suppress(StoreError):  # reported when that store is used
            store = FeatureStore.open(other)
            if store.rows and all(
                store.identity.get(name) == getattr(spec, name) for name in ("architecture", "layer")
            ):
                changes = differences(store.identity, json.loads(json.dumps(spec.identity())))
                found.append((len(changes), other.name, changes))
    if not found:
        return "no features of it yet"
    _, name, changes = min(found)
    return f"{IDENTITY_DIFFERS} from that of {name} in {'; '.join(first(changes, MOST_DIFFERENCES))}"
