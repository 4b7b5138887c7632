"""Lineage: the images that a network's weights were trained on and chosen by, so that nobody cross-validates on them.

A network fine-tuned on the same labelled images leaks their labels to a head on its features, and on images that only chose
among weights the head looks better than it is. The weights file therefore holds the content digests of both. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pipeline.config import BackboneConfig
from pipeline.errors import TrainingError
from pipeline.io.digests import Digests, bytes_digest, digests_to_hex, fingerprint

CONTENTS_KEY = "manyheads_trained_on"
CHOSEN_KEY = "manyheads_chosen_on"
"""Keys of the safetensors header for the digests, as one sorted hex text each."""

LINEAGE_DIGEST_KEY = "manyheads_lineage_digest"
"""Key of the digest of both texts, which allows a check without reading the weights."""

_HEX = 32


@dataclass(frozen=True)
class Lineage:
    """The images behind a weights file, as hex digests; `chosen_on` is None if the file does not record it."""

    trained_on: frozenset[str]
    chosen_on: frozenset[str] | None

    def joined(self, learned: Digests, chose: Digests) -> Lineage:
        """Return the lineage after further training on some images and choosing on others: digests, uint64 (n, 2)."""
        chosen = None if self.chosen_on is None else self.chosen_on | set(digests_to_hex(chose))
        return Lineage(self.trained_on | set(digests_to_hex(learned)), chosen)

    def with_other(self, other: Lineage) -> Lineage:
        """Return the joint lineage of two concatenated networks."""
        known = self.chosen_on is not None and other.chosen_on is not None
        chosen = (self.chosen_on or frozenset()) | (other.chosen_on or frozenset())
        return Lineage(self.trained_on | other.trained_on, chosen if known else None)

    def header(self) -> dict[str, str]:
        """Return the lineage as entries of the safetensors header of a weights file."""
        sets = {CONTENTS_KEY: self.trained_on, CHOSEN_KEY: self.chosen_on}
        texts = {key: "".join(sorted(digests)) for key, digests in sets.items() if digests is not None}
        return {**texts, LINEAGE_DIGEST_KEY: fingerprint(texts)}

    @property
    def digest(self) -> str:
        """The digest of the training images, independent of their order."""
        return bytes_digest(self.header()[CONTENTS_KEY].encode("ascii"))

    def learned(self, digests: Digests) -> NDArray[np.bool_]:
        """Return which images the network was trained on: bool of shape (n,)."""
        return _among(digests, self.trained_on)

    def chose(self, digests: Digests) -> NDArray[np.bool_]:
        """Return which images are known to have been used to choose its weights: bool of shape (n,)."""
        return _among(digests, self.chosen_on or frozenset())


def of(section: BackboneConfig | None, trained_on: str | None) -> Lineage:
    """Return the lineage of an embedding's network, given its section and the `trained_on` of its identity; as `read`."""
    return NONE if section is None or trained_on is None else read(Path(section.weights), trained_on)


def read(weights: Path, expected: str | None = None) -> Lineage:
    """Read the lineage of a weights file; a file without one was trained on none of our images.

    `expected` is the `trained_on` of the embedding, to detect a different file with the same name.

    TrainingError if the file cannot be read or is not the one that made the embedding.
    """
    header = _header(weights)
    texts = {key: header[key] for key in (CONTENTS_KEY, CHOSEN_KEY) if key in header}
    if header.get(LINEAGE_DIGEST_KEY, digest := fingerprint(texts)) != digest:
        raise TrainingError(f"{weights}: is damaged: what it says of its images is not what was written; make it anew")
    found = Lineage(_split(header.get(CONTENTS_KEY, "")), _split(header[CHOSEN_KEY]) if CHOSEN_KEY in header else None)
    if expected is not None and found.digest != expected:
        raise TrainingError(
            f"{weights}: was trained on other images ({found.digest[:12]}) than the features say ({expected[:12]}); run `manyheads features` again"
        )
    return found


NONE = Lineage(frozenset(), frozenset())
"""The lineage of weights that have seen none of our images."""


def _split(text: str) -> frozenset[str]:
    return frozenset(text[start : start + _HEX] for start in range(0, len(text), _HEX))


def _among(digests: Digests, known: frozenset[str]) -> NDArray[np.bool_]:
    return np.array([digest in known for digest in digests_to_hex(digests)], dtype=bool)


def _header(weights: Path) -> dict[str, str]:
    """Return the metadata of a safetensors header."""
    if weights.exists() and not weights.is_file():
        raise TrainingError(f"{weights}: is no ordinary file, expected a safetensors file")
    try:
        with safe_open(weights, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{weights}: cannot be read as a safetensors file ({error})") from None
