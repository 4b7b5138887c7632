"""Concat: several embeddings side by side as one more, of the vectors that are there.

Nothing is embedded or stored for it: heads read the stores of its parts, `predict` sends an image through their networks. No
part weighs more for its scale, as heads standardise every column within the fold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TypeVar

from pipeline.config import BackboneConfig, guess
from pipeline.embed.licenses import joined
from pipeline.embed.records import EmbeddingRecord, open_record
from pipeline.embed.spec import Embedder, EmbeddingSpec, embedding_name
from pipeline.errors import PipelineError
from pipeline.experiment import Artifacts
from pipeline.io.digests import fingerprint
from pipeline.store import FeatureStore, JoinedStores

KIND = "concat"
Places = Sequence[tuple[int, int]]
"""Of the blocks that are side by side a vector which embedder makes each, as which of its outputs."""
Part = TypeVar("Part")


def find_parts(groups: Sequence[Sequence[str]], known: Mapping[str, Part]) -> list[tuple[Part, ...]]:
    """Return the parts that each list of a config's `concat` names.

    Raises
    ------
    PipelineError
        With one line for each name that is none of an embedding.
    """
    unknown = sorted({name for group in groups for name in group if name not in known})
    if unknown:
        raise PipelineError(
            "concat: names what is no embedding of this config",
            [
                f"concat: no embedding {name!r}{guess(name, list(known))}; there are {', '.join(known)}"
                for name in unknown
            ],
        )
    return [tuple(known[name] for name in group) for group in groups]


def by_name(records: Sequence[EmbeddingRecord]) -> dict[str, EmbeddingRecord]:
    """Return records by name, those of a network that stands in for another also by what the other's would be."""
    asked = {default_name(each): record for record in records if (each := record.instead_of)}
    return asked | {record.name: record for record in records}


def default_name(section: BackboneConfig) -> str:
    """Return what the first embedding of a section is called that names no pooling."""
    return embedding_name(section.name, section.weights, section.layers[0])


def concatenated(groups: Sequence[Sequence[str]], records: Sequence[EmbeddingRecord]) -> tuple[EmbeddingRecord, ...]:
    """Return a record for each list of names; raises as `find_parts` does."""
    taken = {record.name for record in records}
    found = []
    for parts in find_parts(groups, by_name(records)):
        record = _joined(parts)
        if record.name in taken:
            record = replace(record, name="+".join(part.name for part in parts))
        taken.add(record.name)
        found.append(record)
    return tuple(found)


def _joined(parts: Sequence[EmbeddingRecord]) -> EmbeddingRecord:
    """Describe several embeddings as one; a name that they begin with alike is said once."""
    names = [part.name.split("-") for part in parts]
    alike = sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False)))
    shared = min(alike, *(len(words) - 1 for words in names))
    trained = [part.spec.trained_on for part in parts if part.spec.trained_on is not None]
    spec = EmbeddingSpec(
        name="+".join(["-".join(names[0]), *("-".join(words[shared:]) for words in names[1:])]),
        kind=KIND,
        library="manyheads",
        architecture=_each_once(part.spec.architecture for part in parts),
        arguments={},
        weights=_each_once(part.spec.weights for part in parts),
        weights_digest=fingerprint({"parts": [part.fingerprint for part in parts]}),
        layer="+".join(part.spec.layer for part in parts),
        pooling="none",
        dim=sum(part.spec.dim for part in parts),
        preprocessing={},
        precision=_each_once(part.spec.precision for part in parts),
        engine=_each_once(part.spec.engine for part in parts),
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
        seconds_per_image=_seconds(parts),
        max_pixels=parts[0].max_pixels,
        parts=tuple(parts),
    )


def _each_once(words: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(words))


def _seconds(parts: Sequence[EmbeddingRecord]) -> float | None:
    """What an image costs: the layers of one network come of one pass."""
    by_network: dict[str, float] = {}
    for part in parts:
        if part.seconds_per_image is None:
            return None
        network = part.name if part.section is None else part.section.model_dump_json()
        by_network[network] = max(part.seconds_per_image, by_network.get(network, 0.0))
    return sum(by_network.values())


def open_features(record: EmbeddingRecord, files: Artifacts) -> FeatureStore | JoinedStores:
    """Open the vectors of an embedding; StoreError where they are missing, damaged or of another identity."""
    if record.parts:
        return JoinedStores(tuple(_open(part, files) for part in record.parts))
    return _open(record, files)


def _open(record: EmbeddingRecord, files: Artifacts) -> FeatureStore:
    return FeatureStore.open(files.find_store(record.store), record.fingerprint)


def open_networks(
    records: Mapping[str, Sequence[EmbeddingRecord]], device: str, *, trust_code: bool = False
) -> tuple[list[Embedder], Mapping[str, Sequence[Places]]]:
    """Make the embedders of each target's embeddings again, each once, and say of each embedding where its blocks come from.

    Raises
    ------
    BackboneError
        As `open_record` does.
    """
    embedders: list[Embedder] = []

    def place(part: EmbeddingRecord) -> tuple[int, int]:
        for number, embedder in enumerate(embedders):
            prints = [replace(spec, engine=part.spec.engine).fingerprint() for spec in embedder.specs]
            if part.fingerprint in prints:
                return number, prints.index(part.fingerprint)
        embedder, output = open_record(part, device, trust_code=trust_code)
        embedders.append(embedder)
        return len(embedders) - 1, output

    places = {
        target: [[place(part) for part in record.parts or (record,)] for record in own]
        for target, own in records.items()
    }
    return embedders, places
