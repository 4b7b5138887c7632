"""Licences of weights: what is known of them, and whether a config that asks for permissive ones may use them. No torch."""

from __future__ import annotations

UNKNOWN = "unknown"
"""Nothing that comes with the weights says under which terms they may be used; so nobody can call them permissive."""

PERMISSIVE = frozenset(
    {"0bsd", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "mit", "unlicense"}
)
"""Licences, in lower case as SPDX has them, that let anyone use, change and sell, at most naming the authors."""
