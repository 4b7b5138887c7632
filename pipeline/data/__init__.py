"""The data set: sources of images become one index of path, label, split, group and content digest.

Who reads that index needs no more than these; who makes it, or says something of the images, asks `scan`, `sources`, `folder`.
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
