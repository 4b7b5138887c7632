"""Family: networks that are built and loaded in one way. A file and a row of `families.FAMILIES` for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from pipeline.config import BackboneConfig
from pipeline.images import Preprocessing


class Published(NamedTuple):
    """A network with weights that its family publishes, in fp32 on the processor."""

    module: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    """What the weights were trained to tell apart; empty where nobody says."""


@dataclass(frozen=True)
class Family:
    """How the networks of one family are named, built and loaded; nothing here knows layers, devices or precision."""

    library: str
    """Whose code the networks are, as it stands in identities."""
    names: Callable[[], Sequence[str]]
    """The networks that a config can name."""
    builds: Callable[[str], bool]
    """Whether an architecture is one of the family's; more than a config can name where weights files describe others."""
    any_size: bool
    """Whether networks are built for one image size, `image_size` of their arguments, and the same weights fit any."""
    build: Callable[[str, Mapping[str, Any]], nn.Module]
    """Construct a network from its architecture and arguments, with whatever weights its constructor makes."""
    preprocessing: Callable[[str], Preprocessing]
    """The transform of an architecture's first published weights, for weights that come without one."""
    weights: Callable[[str], Sequence[str]]
    """The names of a network's published weights."""
    published: Callable[[BackboneConfig], Published]
    """Load published weights, fetching them if need be."""
    to_fetch: Callable[[BackboneConfig], tuple[str, Path, float] | None]
    """Where published weights have to be fetched from, to which folder, and how many MB; None where they are here."""
