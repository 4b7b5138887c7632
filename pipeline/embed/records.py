"""Records of embeddings in `features.json`: their specs, their stores, how to recompute them, and concatenation. No torch.

Stage one writes `features.json`, every later stage reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from pipeline.config import (
    LOCAL_DIR,
    BackboneConfig,
    Config,
    DatasetConfig,
    ExtractionConfig,
    guess,
    names_code,
    names_timm,
    names_vectors,
)
from pipeline.embed import baselines
from pipeline.embed.engines import choice_inputs, engine_at_hand
from pipeline.embed.published import BUNDLED, about_stand_in, joined, require_permitted
from pipeline.embed.spec import EMBED_VERSION, EmbeddingModel, EmbeddingSpec, embedding_name
from pipeline.errors import BackboneError, PipelineError, StoreError
from pipeline.experiment import FEATURES, SPECS, Artifacts, from_plain, read_document, write_document
from pipeline.images import DECODE_MODES, DECODE_POLICY
from pipeline.io.digests import fingerprint
from pipeline.io.files import make_folder
from pipeline.io.process import version
from pipeline.store import FeatureStore, JoinedStores, differences

logger = logging.getLogger(__name__)

MALFORMED = (KeyError, TypeError, ValueError, AttributeError)
"""Exceptions when reading a document of another version."""


@dataclass(frozen=True)
class EmbeddingRecord:
    """One embedding of an experiment, with all that is needed to recompute its vectors; StoreError if its store is outside of it."""

    name: str
    spec: EmbeddingSpec
    store: str
    """The name of its feature store, for `Artifacts.find_store`; in release 0.1, its path in the output folder."""
    digest: str
    """The state of the store when stage one ended."""
    section: BackboneConfig | None
    """The backbone's config section; None for a baseline or concat."""
    seed: int
    seconds_per_image: float | None = None
    """Last measured time per image, for decoding and the network together."""
    max_pixels: int = DatasetConfig().max_pixels
    """The experiment's limit on an image's size, which also applies to new images."""
    instead_of: BackboneConfig | None = None
    """The config section for which `section` is the substitute, as its weights were not installed."""
    parts: tuple[EmbeddingRecord, ...] = ()
    """The embeddings of a `concat`."""

    def __post_init__(self) -> None:
        parts = {*self.store.split("/"), *self.name.split("/")}
        if parts & {"", ".", ".."} or {"\0", "\\"} & {*self.store, *self.name} or "/" in self.name:
            raise StoreError(f"embedding {self.name!r}: its store {self.store!r} lies outside of its experiment")

    @property
    def asked(self) -> BackboneConfig | None:
        """The section as written in the config."""
        return self.instead_of or self.section

    @property
    def kind(self) -> str:
        """`backbone`, `baseline` or `concat`."""
        return self.spec.kind

    @property
    def network(self) -> str:
        """The first part of its name: network and weights."""
        return self.name if self.section is None else embedding_name(self.section.name, self.spec.weights)

    @property
    def layer(self) -> str:
        """The rest of its name: the layer as named in the config, and the pooling."""
        return self.name.removeprefix(f"{self.network}-")

    @property
    def fingerprint(self) -> str:
        """The digest of the identity."""
        return self.spec.fingerprint()

    @property
    def untrained(self) -> bool:
        """Whether its weights are random."""
        return self.spec.untrained


# ---- features.json

NOT_SHARED = {"max_failures", "target"}
"""Keys of `dataset` that affect neither features nor index."""


def write_records(path: Path, records: Sequence[EmbeddingRecord], config: Config, index: str) -> None:
    """Write `features.json`; `index` is the fingerprint of the data set's index."""
    document = {
        **Artifacts(path.parent, config.store).stores_told(),
        "shared": shared(config),
        "backbones": config.sections,
        "index": index,
        "embeddings": records,
    }
    write_document(path, FEATURES, document)


def shared(config: Config) -> dict[str, Any]:
    """Return the settings of a config that all its embeddings share: the images, and how they are embedded."""
    return {
        "seed": config.seed,
        "dataset": config.dataset.model_dump(mode="json", exclude=NOT_SHARED),
        "extraction": config.extraction.model_dump(mode="json", include={"precision", "engine", "decode"}),
    }


def read_records(path: Path) -> tuple[EmbeddingRecord, ...]:
    """Read `features.json` of any config; PipelineError if it is missing or of another version."""
    return _records_of(read_document(path, FEATURES), path)


def _records_of(document: Mapping[str, Any], path: Path) -> tuple[EmbeddingRecord, ...]:
    try:
        return cast(tuple[EmbeddingRecord, ...], from_plain(tuple[EmbeddingRecord, ...], document["embeddings"]))
    except MALFORMED:
        raise PipelineError(f"{path}: is of another version; run `manyheads features` again") from None


def read_asked_records(path: Path, config: Config) -> tuple[EmbeddingRecord, ...]:
    """Read a config's embeddings from `features.json`; PipelineError with all that differ, are missing or have a refused licence."""
    document = read_document(path, FEATURES)
    records = _records_of(document, path)
    asked = from_plain(tuple[BackboneConfig, ...], document["backbones"])
    problems = departures(document["shared"], asked, config, "the run of `manyheads features`")
    named = set(baselines.NAMES if config.baselines is None else config.baselines) & set(baselines.NAMES)
    problems += [f"baselines: not {name}" for name in sorted(named.difference([record.name for record in records]))]
    if problems:
        raise PipelineError(
            f"{path}: its features are of another config; run `manyheads features` with this config first, which embeds only "
            "what is new",
            problems,
        )
    # Two sections may name the same embedding, whose record has only the first: then sections cannot select records.
    made = [record.asked for record in records]
    ambiguous = any(section not in made for section in asked)
    chosen = []
    for record in records:
        is_asked = record.name in named if record.kind == "baseline" else ambiguous or record.asked in config.sections
        if is_asked:
            chosen.append(record)
            if record.instead_of is not None:
                logger.warning("%s", about_stand_in(record.instead_of))
    require_permitted(config.licenses, [(record.name, record.spec.license) for record in chosen])
    return tuple(chosen)


def departures(made: Mapping[str, Any], backbones: Sequence[BackboneConfig], config: Config, whose: str) -> list[str]:
    """Return a line for each setting and backbone of a config that is not in an earlier run, named `whose`, with `shared` = `made`."""
    then = DatasetConfig().model_dump(mode="json", exclude=NOT_SHARED)
    made = {**made, "dataset": {**then, **made["dataset"]}}
    lines = differences(made, shared(config), whose, "this config")
    for section in config.sections:
        if section not in backbones:
            given = section.model_dump(mode="json", exclude_defaults=True)
            lines.append("backbones: not " + ", ".join([f"{key}: {value}" for key, value in given.items()]))
    return lines


def require_index(path: Path, fingerprint: str) -> None:
    """Check that the features belong to the index of this fingerprint, its labels, splits and images; PipelineError if not."""
    if read_document(path, FEATURES).get("index") != fingerprint:
        raise PipelineError(
            f"{path.parent / 'dataset' / 'index.csv'}: is not the index that the features were made of; "
            "run `manyheads features` again, which embeds only what is new"
        )


def choose(records: Sequence[EmbeddingRecord], name: str | None, option: str = "`embedding`") -> EmbeddingRecord:
    """Return an embedding by name, by default the only backbone's; StoreError, naming `option`, if this is not exactly one."""
    backbones = [record for record in records if record.kind == "backbone"]
    candidates = [record for record in records if record.name == name] if name else backbones or records
    if len(candidates) != 1:
        found = ", ".join(record.name for record in records)
        raise StoreError(f"name one embedding with {option}; this experiment has {found}")
    return candidates[0]


# ---- stores, and the specs of a section without loading its network


def place(spec: EmbeddingSpec, files: Artifacts, folders: Sequence[Path] = ()) -> Path:
    """Return the path of the embedding's store in the shared folder or `folders`; a renamed weights file may have changed its name."""
    path = files.store(spec.name, spec.fingerprint())
    found = (each for folder in (files.stores, *folders) for each in sorted(folder.glob(named(spec))))
    return next(found, path)


def named(spec: EmbeddingSpec) -> str:
    """Return the file name pattern of an embedding's store."""
    return f"*-{spec.fingerprint()[:12]}.store"


def open_store(path: Path, fingerprint: str | None = None) -> FeatureStore | None:
    """Open an embedding's store; None if it has no snapshot yet, StoreError if it is damaged."""
    return FeatureStore.open(path, fingerprint) if any(path.glob("snapshot-*.h5")) else None


def open_features(record: EmbeddingRecord, files: Artifacts) -> FeatureStore | JoinedStores:
    """Open the vectors of an embedding; StoreError if they are missing, damaged or of another identity."""
    stores = [FeatureStore.open(files.find_store(part.store), part.fingerprint) for part in record.parts or (record,)]
    return JoinedStores(tuple(stores)) if record.parts else stores[0]


def spec_key(section: BackboneConfig, config: Config) -> str:
    """Return the digest of all that a section's specs depend on, without importing torch."""
    local = section.name.startswith(LOCAL_DIR)
    files = sorted(Path(section.name.removeprefix(LOCAL_DIR)).glob("*")) if local else []
    return fingerprint(
        {
            "embed_version": EMBED_VERSION,
            "section": section.model_dump(mode="json"),
            "asked": config.extraction.model_dump(mode="json", include={"device", "precision", "engine", "decode"}),
            "seed": config.seed if section.weights == "random" or section.view else None,
            "machine": choice_inputs(),
            "decode": dict(DECODE_POLICY),
            "file": _state_of(BUNDLED if section.weights == "bundled" else Path(section.weights)),
            **({"vectors": _state_of(Path(section.name))} if names_vectors(section.name) else {}),
            **({"timm": [version("timm"), *map(_state_of, files)]} if names_timm(section.name) else {}),
        }
    )


def _state_of(path: Path) -> list[Any] | None:
    """Return what changes when a file is written: its path, inode, size and times; None if it does not exist."""
    try:
        state = path.stat()
    except OSError:
        return None
    return [str(path), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def read_specs(path: Path) -> dict[str, tuple[EmbeddingSpec, ...]]:
    """Return the cached specs; empty if the file is missing, damaged or of another version, as they can be determined again."""
    try:
        entries = read_document(path, SPECS)["entries"]
        return {key: from_plain(tuple[EmbeddingSpec, ...], specs) for key, specs in entries.items()}
    except (PipelineError, *MALFORMED):
        return {}


def write_specs(path: Path, specs: Mapping[str, Sequence[EmbeddingSpec]]) -> None:
    """Write the specs by their keys into the cache."""
    make_folder(path.parent)
    write_document(path, SPECS, {"entries": specs})


# ---- the live embedders


def load(
    section: BackboneConfig | None, baseline: str, extraction: ExtractionConfig, seed: int, images: int = 0
) -> EmbeddingModel:
    """Load the embedder of a section, or if that is None the baseline of that name; BackboneError if it is not available."""
    if section is None:
        return baselines.load(baseline, extraction.decode)
    if names_vectors(section.name):
        return baselines.load_vectors(section)
    from pipeline.embed import backbone  # loads torch

    return backbone.load(section, extraction, seed, images)


def open_record(record: EmbeddingRecord, device: str, *, trust_code: bool = False) -> tuple[EmbeddingModel, int]:
    """Load the embedder of a recorded embedding, and return it with the index of the embedding's output.

    `trust_code` allows networks that are code of the user's. BackboneError if such a network is not trusted, or if weights,
    preprocessing or a library have changed, so that its vectors would not be comparable.
    """
    spec, section = record.spec, record.section
    if section is not None and names_vectors(section.name):
        raise baselines.no_network(section.name)
    if section is not None and names_code(section.name) and not trust_code:
        raise BackboneError(
            f"{record.name}: its network is code, {section.name}, which can do anything when run; if you trust its author, "
            "add --trust (predict), or name it under backbones in the config"
        )
    decode = spec.preprocessing["decode"]["mode"]
    if decode not in DECODE_MODES:
        raise BackboneError(
            f"{record.name}: images are no longer decoded by {decode!r}; run `manyheads features` again"
        )
    engine = spec.engine if section is None else engine_at_hand(spec.engine, device)
    if engine != spec.engine:
        message = "%s was made by %s, this run has %s: the same network, whose vectors agree but for rounding"
        logger.warning(message, record.name, spec.engine, engine)
    asked = {"device": device, "precision": spec.precision, "decode": decode}
    extraction = ExtractionConfig.model_validate(asked if section is None else {**asked, "engine": engine})
    embedder = load(section, spec.architecture, extraction, record.seed)
    for output, made in enumerate(embedder.specs):
        if replace(made, engine=spec.engine).fingerprint() == record.fingerprint:
            return embedder, output
    closest = min((differences(spec.identity(), made.identity()) for made in embedder.specs), key=len)
    raise BackboneError(f"{record.name}: this machine computes another embedding than the stored one", closest)


Places = Sequence[tuple[int, int]]
"""(embedder, output) of each block of a concatenated vector, as indices."""


class Networks(NamedTuple):
    """Embedders, and for each target the sources of the vectors of each part of its head."""

    embedders: Sequence[EmbeddingModel]
    places: Mapping[str, Sequence[Places]]

    def in_float64(self) -> Networks:
        """Return the same with networks computing in float64; baselines are unchanged."""
        made = [each.in_float64() if hasattr(each, "in_float64") else each for each in self.embedders]
        return Networks(made, self.places)


def open_networks(
    records: Mapping[str, Sequence[EmbeddingRecord]], device: str, *, trust_code: bool = False
) -> Networks:
    """Load the embedders of all targets' embeddings, each once; errors are those of `open_record`."""
    embedders: list[EmbeddingModel] = []

    def find(part: EmbeddingRecord) -> tuple[int, int]:
        for number, embedder in enumerate(embedders):
            prints = [replace(spec, engine=part.spec.engine).fingerprint() for spec in embedder.specs]
            if part.fingerprint in prints:
                return number, prints.index(part.fingerprint)
        embedder, output = open_record(part, device, trust_code=trust_code)
        embedders.append(embedder)
        return len(embedders) - 1, output

    places = {
        target: [[find(part) for part in record.parts or (record,)] for record in own]
        for target, own in records.items()
    }
    return Networks(embedders, places)


# ---- concat: concatenations of embeddings
#
# They need no embedding or store: heads read the stores of the parts, `predict` runs an image through their networks. The
# scale of a part does not matter, as heads standardise every column within the fold.

CONCAT = "concat"
PartT = TypeVar("PartT")


def find_parts(groups: Sequence[Sequence[str]], known: Mapping[str, PartT]) -> list[tuple[PartT, ...]]:
    """Return the parts named by each list of a config's `concat`; PipelineError with a line for each unknown name."""
    there, problems = f"there are {', '.join(known)}", []
    for name in sorted({name for group in groups for name in group if name not in known}):
        problems.append(f"concat: no embedding {name!r}{guess(name, list(known))}; {there}")
    if problems:
        raise PipelineError("concat: unknown embeddings", problems)
    return [tuple(map(known.__getitem__, group)) for group in groups]


def concatenated(groups: Sequence[Sequence[str]], records: Sequence[EmbeddingRecord]) -> tuple[EmbeddingRecord, ...]:
    """Return a record of the concatenation for each list of names; errors are those of `find_parts`."""
    return tuple(map(_concatenate, find_parts(groups, {record.name: record for record in records})))


def _concatenate(parts: Sequence[EmbeddingRecord]) -> EmbeddingRecord:
    """Return the record of concatenated embeddings; a common prefix of their names is written once."""
    names = [part.name.split("-") for part in parts]
    shared = 0
    while all(len(words) > shared + 1 for words in names) and len({words[shared] for words in names}) == 1:
        shared += 1
    trained = [part.spec.trained_on for part in parts if part.spec.trained_on is not None]
    seconds = {part.network: part.seconds_per_image for part in parts}  # the layers of one network share a pass

    def each_once(words: Iterable[str]) -> str:
        return "+".join(dict.fromkeys(words))

    spec = EmbeddingSpec(
        name="+".join(["-".join(names[0]), *("-".join(words[shared:]) for words in names[1:])]),
        kind=CONCAT,
        library="manyheads",
        architecture=each_once(part.spec.architecture for part in parts),
        arguments={},
        weights=each_once(part.spec.weights for part in parts),
        weights_digest=fingerprint({"parts": [part.fingerprint for part in parts]}),
        layer="+".join(part.spec.layer for part in parts),
        pooling="none",
        dim=sum(part.spec.dim for part in parts),
        preprocessing={},
        precision=each_once(part.spec.precision for part in parts),
        engine=each_once(part.spec.engine for part in parts),
        untrained=any(part.untrained for part in parts),
        trained_on=fingerprint({"parts": trained}) if trained else None,
        license=joined(part.spec.license for part in parts),
    )
    return EmbeddingRecord(
        name=spec.name,
        spec=spec,
        store="+".join(part.store for part in parts),
        digest=fingerprint({"parts": [part.digest for part in parts]}),
        section=None,
        seed=parts[0].seed,
        seconds_per_image=None if None in seconds.values() else sum(filter(None, seconds.values())),
        max_pixels=parts[0].max_pixels,
        parts=tuple(parts),
    )
