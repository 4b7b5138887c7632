"""Lineage: which images a network's weights have learned from, so that nobody cross-validates on them.

A head on features of a network that was fine-tuned on the same labelled images is told the answers: its folds are no
longer unseen. The weights file therefore carries the content digests of those images. Needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.digests import Digests, bytes_digest, digests_from_hex, digests_to_hex
from pipeline.errors import TrainingError

CONTENTS_KEY = "manyheads_trained_on"
"""Key of the safetensors header under which the digests stand, as one hex text, sorted."""

_HEX = 32


def contents_text(digests: Digests) -> str:
    """Return the text that names a set of image contents: their hex digests, sorted, without repeats."""
    return "".join(sorted(set(digests_to_hex(digests))))


def contents_digest(digests: Digests) -> str:
    """Return the one digest of a set of image contents, whatever their order."""
    return bytes_digest(contents_text(digests).encode("ascii"))


def trained_on(weights: Path) -> Digests:
    """Read the contents a weights file was trained on, shape (n, 2); none when the file does not say.

    Raises
    ------
    TrainingError
        When the file cannot be read.
    """
    text = _header(weights).get(CONTENTS_KEY, "")
    return digests_from_hex(text[start : start + _HEX] for start in range(0, len(text), _HEX))


def seen(weights: Path, digests: Digests, expected: str) -> NDArray[np.bool_]:
    """Say which images a network has learned from: bool of shape (n,).

    `expected` is the `trained_on` of the embedding, so that another file under the same name is noticed.

    Raises
    ------
    TrainingError
        When the file cannot be read or is not the one the embedding was made with.
    """
    known = trained_on(weights)
    found = contents_digest(known)
    if found != expected:
        raise TrainingError(
            f"{weights}: was trained on other images ({found[:12]}) than the features say ({expected[:12]}); run `manyheads features` again"
        )
    names = set(digests_to_hex(known))
    return np.array([name in names for name in digests_to_hex(digests)], dtype=bool)


def _header(weights: Path) -> dict[str, str]:
    """The text part of a safetensors header: 8 bytes of length, then JSON."""
    try:
        with weights.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(min(length, 1 << 30))).get("__metadata__", {})
    except (OSError, ValueError, AttributeError) as error:
        raise TrainingError(f"{weights}: cannot be read as a safetensors file ({error})") from None
    return {str(key): str(value) for key, value in metadata.items()}
