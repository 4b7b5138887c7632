"""What a config asks to embed: each backbone section and baseline, and the embeddings it gives.

The embeddings of a section are known only once its network has been loaded (the digest of its weights, the length of its
vectors). They are therefore kept in `specs.json` under all that they depend on, and the next run loads no network to learn
that there is nothing to do. So `engine: auto` is decided once, by the images that there were then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config import BackboneConfig, Config
from pipeline.embed import baselines
from pipeline.embed import networks as backbone
from pipeline.embed.records import Embedder
from pipeline.embed.spec import EMBED_VERSION, EmbeddingSpec
from pipeline.errors import PipelineError
from pipeline.experiment import SPECS, Artifacts, read_document, write_document
from pipeline.images import DECODE_POLICY
from pipeline.io.digests import Digests, fingerprint
from pipeline.io.files import make_folder
from pipeline.stages.extract.stores import open_store, others, place


@dataclass
class Source:
    """One backbone section or baseline; its network is loaded when it is first needed."""

    section: BackboneConfig | None
    specs: tuple[EmbeddingSpec, ...]
    config: Config
    embedder: Embedder | None = field(default=None, repr=False)

    def load(self) -> Embedder:
        """Return the live embedder."""
        if self.embedder is None:
            extraction = self.config.extraction.model_copy(update={"engine": self.specs[0].engine})
            self.embedder = (
                baselines.load(self.specs[0].architecture, extraction.decode)
                if self.section is None
                else backbone.load(self.section, extraction, self.config.seed)
            )
        return self.embedder


def resolve(config: Config, files: Artifacts, digests: Digests) -> list[Source]:
    """Return every source with its embeddings, under names that are unique in the experiment.

    `digests` are the distinct images of the data set, shape (n, 2). An engine is chosen for their number, unless another
    experiment has embedded most of them with one.

    Raises
    ------
    BackboneError
        When a network that has to be loaded for it is not to be had.
    """
    known = _read(files.specs)
    found: dict[str, list[dict[str, Any]]] = dict(known)
    sources = []
    for section in config.backbones:
        key = _key(section, config)
        source = Source(section, _known_specs(known.get(key)) or _specs_of_others(key, files, digests), config)
        if not source.specs:
            made = backbone.load(section, config.extraction, config.seed, len(digests))
            source = replace(source, embedder=made, specs=made.specs)
        if key not in known or not _known_specs(known[key]):
            found[key] = [spec.to_dict() for spec in source.specs]
        sources.append(source)
    for name in config.baselines:
        if name != "majority":
            sources.append(Source(None, baselines.load(name, config.extraction.decode).specs, config))
    if found != known:
        make_folder(files.root)
        write_document(files.specs, SPECS, {"entries": found})
    return _with_unique_names(sources)


def _specs_of_others(key: str, files: Artifacts, digests: Digests) -> tuple[EmbeddingSpec, ...]:
    """The embeddings that another experiment found out for the same section, where they have most of the images already."""
    for other in others(files)[0]:
        specs = _known_specs(_read(other.specs).get(key))
        stores = [open_store(place(spec, files), spec) for spec in specs]
        if stores and all(
            store is not None and 2 * int(store.missing(digests).sum()) <= len(digests) for store in stores
        ):
            return specs
    return ()


def _key(section: BackboneConfig, config: Config) -> str:
    """The digest of all that the specs of a section depend on, none of which needs torch to be known."""
    return fingerprint(
        {
            "embed_version": EMBED_VERSION,
            "section": section.model_dump(mode="json"),
            "asked": config.extraction.model_dump(mode="json", include={"device", "precision", "engine", "decode"}),
            "seed": config.seed if section.weights == "random" else None,
            "machine": backbone.choice_inputs(),
            "decode": dict(DECODE_POLICY),
            "file": _state_of(backbone.BUNDLED if section.weights == "bundled" else Path(section.weights)),
        }
    )


def _state_of(path: Path) -> list[Any] | None:
    """What changes when a file is written, or None where there is none."""
    try:
        state = path.stat()
    except OSError:
        return None
    return [str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The kept specs; nothing where the file is missing, damaged or of another version: they are found out again."""
    try:
        return dict(read_document(path, SPECS)["entries"])
    except (PipelineError, KeyError, TypeError, ValueError):
        pass
    return {}


def _known_specs(entries: list[Mapping[str, Any]] | list[dict[str, Any]] | None) -> tuple[EmbeddingSpec, ...]:
    try:
        return tuple(EmbeddingSpec.from_dict(entry) for entry in entries or ())
    except (TypeError, AttributeError, KeyError, ValueError):  # fields of another version of this package
        return ()


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Tell apart embeddings whose readable names agree though their vectors do not, by the start of the fingerprint."""
    prints: dict[str, set[str]] = {}
    for source in sources:
        for spec in source.specs:
            prints.setdefault(spec.name, set()).add(spec.fingerprint())
    return [
        replace(
            source,
            specs=tuple(
                replace(spec, name=f"{spec.name}-{spec.fingerprint()[:6]}") if len(prints[spec.name]) > 1 else spec
                for spec in source.specs
            ),
        )
        for source in sources
    ]
