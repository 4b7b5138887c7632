"""Family: networks that are named, built and loaded in one way. A file and a row of `families.FAMILIES` for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from pipeline.embed.licenses import UNKNOWN
from pipeline.images import Preprocessing

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
    dim: Callable[[], int | None] = lambda: None
    """Length of the vector of the penultimate layer, found without the weights; None where it is not known."""


@dataclass(frozen=True)
class Family:
    """The networks of one library; nothing here knows layers, devices or precision."""

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
