"""Licences of weights: what is known of them, and whether a config that asks for permissive ones may use them. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import BackboneError

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
    """See that the licences of some weights are what a config's `licenses` allows; `found` are what to call them, and theirs.

    Raises
    ------
    BackboneError
        With one line for each that is not.
    """
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
