"""Lineage: which images a network's weights have learned from and been chosen by, so that nobody cross-validates on them.

A head on features of a network that was fine-tuned on the same labelled images is told the answers, and on images that only chose
among weights it looks better than it is. The weights file therefore carries the content digests of both. Needs no torch.
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
"""Keys of the safetensors header under which the digests stand, as one hex text, sorted."""

LINEAGE_DIGEST_KEY = "manyheads_lineage_digest"
"""Key of the digest of both texts, which can be checked without reading the weights."""

_HEX = 32


@dataclass(frozen=True)
class Lineage:
    """What a weights file says of the images behind it, as hex digests; `chosen_on` is None where it does not say."""

    trained_on: frozenset[str]
    chosen_on: frozenset[str] | None

    def joined(self, learned: Digests, chose: Digests) -> Lineage:
        """Return the lineage of weights that were trained further on some images and chosen on others: digests, uint64 (n, 2)."""
        chosen = None if self.chosen_on is None else self.chosen_on | set(digests_to_hex(chose))
        return Lineage(self.trained_on | set(digests_to_hex(learned)), chosen)

    def with_other(self, other: Lineage) -> Lineage:
        """Return what two networks side by side have met."""
        known = self.chosen_on is not None and other.chosen_on is not None
        chosen = (self.chosen_on or frozenset()) | (other.chosen_on or frozenset())
        return Lineage(self.trained_on | other.trained_on, chosen if known else None)

    def header(self) -> dict[str, str]:
        """Return what a weights file says of it, as text by key of the safetensors header."""
        sets = {CONTENTS_KEY: self.trained_on, CHOSEN_KEY: self.chosen_on}
        texts = {key: "".join(sorted(digests)) for key, digests in sets.items() if digests is not None}
        return {**texts, LINEAGE_DIGEST_KEY: fingerprint(texts)}

    @property
    def digest(self) -> str:
        """The one digest of the images that were learned from, whatever their order."""
        return bytes_digest(self.header()[CONTENTS_KEY].encode("ascii"))

    def learned(self, digests: Digests) -> NDArray[np.bool_]:
        """Say which images the network has learned from: bool of shape (n,)."""
        return _among(digests, self.trained_on)

    def chose(self, digests: Digests) -> NDArray[np.bool_]:
        """Say which images are known to have chosen among its weights: bool of shape (n,)."""
        return _among(digests, self.chosen_on or frozenset())


def of(section: BackboneConfig | None, trained_on: str | None) -> Lineage:
    """Return the lineage of an embedding's network, by its section and what its identity says that it was trained on; as `read`."""
    return NONE if section is None or trained_on is None else read(Path(section.weights), trained_on)


def read(weights: Path, expected: str | None = None) -> Lineage:
    """Read the lineage of a weights file; a file without any has learned from no image of ours.

    `expected` is the `trained_on` of the embedding, so that another file under the same name is noticed.

    TrainingError when the file cannot be read or is not the one the embedding was made with.
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
"""Of weights that have met no image of ours."""


def _split(text: str) -> frozenset[str]:
    return frozenset(text[start : start + _HEX] for start in range(0, len(text), _HEX))


def _among(digests: Digests, known: frozenset[str]) -> NDArray[np.bool_]:
    return np.array([digest in known for digest in digests_to_hex(digests)], dtype=bool)


def _header(weights: Path) -> dict[str, str]:
    """Return the text part of a safetensors header."""
    if weights.exists() and not weights.is_file():
        raise TrainingError(f"{weights}: is no ordinary file, expected a safetensors file")
    try:
        with safe_open(weights, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{weights}: cannot be read as a safetensors file ({error})") from None
