"""Files of weights: those a user names, and torchvision's own, with nothing but tensors taken from either."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import BackboneError, first_line
from pipeline.experiment import MADE_BY
from pipeline.io.digests import canonical_json, fingerprint

logger = logging.getLogger(__name__)

METADATA_KEY = "manyheads"
"""Under it a weights file made by this project carries its description in the safetensors header."""
DIGEST_KEY = "manyheads_digest"
"""Under it such a file carries the digest of its tensors and its description."""

WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
"""What DataParallel, torch.compile, Lightning and self-supervised training put before the names of a network's tensors, in any
order; what lies beside them is of the training, such as a projection head."""


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a weights file: its tensors, and the description a file of this project carries.

    Each tensor has the shape and dtype that it has in the file.

    Raises
    ------
    BackboneError
        When the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise BackboneError(
            f"weights file {path} does not exist; a path in a config is relative to the config's folder, one given with --set to "
            "the folder the command is run in"
        )
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _tensors(torch.load(path, map_location="cpu", weights_only=True), path), {}
    except BackboneError:
        raise
    except Exception as error:  # the readers raise almost anything on damaged files
        reason = first_line(error)
        raise BackboneError(
            f"weights file {path} cannot be read as tensors only ({reason}); save it with torch.save(model.state_dict(), ...) or as .safetensors"
        ) from None


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    description = json.loads(metadata.get(METADATA_KEY, "{}"))
    ours = DIGEST_KEY in metadata or MADE_BY in description
    if ours and metadata.get(DIGEST_KEY) != weights_digest(state, metadata):
        raise BackboneError(
            f"weights file {path} is damaged: its content is not the one that its digest names; make it anew, or fetch it again"
        )
    return _tensors(state, path), description


def weights_digest(state: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """Return the one digest of a weights file of this project: of its tensors and the texts in its header.

    The tensors may be of any shape and dtype, both of which the digest covers.
    """
    return fingerprint([tensors_digest(state), {key: text for key, text in header.items() if key != DIGEST_KEY}])


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what a file holds: itself, or under the keys training scripts use."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        raise BackboneError(
            f"weights file {path} holds no state dict; expected names with tensors, at the top or under 'state_dict' or 'model'"
        )
    state, others = dict(content), list[str]()
    while prefix := next((found for found in WRAPPERS if any(name.startswith(found) for name in state)), None):
        others += [name for name in state if not name.startswith(prefix)]
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if others:
        logger.info(
            "%s: tensors that are no part of the network are left out: %d, such as %s", path, len(others), others[0]
        )
    densenet = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # its old names are written the new way
    return {densenet.sub(r"\1\2", name): value for name, value in state.items()}


def tensors_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the hex BLAKE2b-256 of tensors: of each, sorted by name, the name, dtype, shape and bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
