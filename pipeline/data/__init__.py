"""The data set: sources of images become one index of path, label, split, group and content digest.

Readers of the index need only these names; modules that build it import from `scan`, `sources` and `folder`.
"""

from __future__ import annotations

from pipeline.data.failures import REMARKS, Failure, check_failures, failed_digests, read_failures, record_failures
from pipeline.data.index import DatasetIndex

__all__ = [
    "REMARKS",
    "DatasetIndex",
    "Failure",
    "check_failures",
    "failed_digests",
    "read_failures",
    "record_failures",
]
