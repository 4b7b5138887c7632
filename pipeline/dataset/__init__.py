"""The data set: sources of images become one index of path, label, split, group and content digest."""

from __future__ import annotations

from pipeline.dataset.index import DatasetIndex
from pipeline.dataset.ledger import LedgerEntry, check_failures, failed_digests, read_ledger, record_failures
from pipeline.dataset.listing import is_image_name
from pipeline.dataset.report import ScanResult, difference_text, fold_warnings, missing_side
from pipeline.dataset.scan import require_its_own, scan
from pipeline.dataset.sources import needs_download

__all__ = [
    "DatasetIndex",
    "LedgerEntry",
    "ScanResult",
    "check_failures",
    "difference_text",
    "failed_digests",
    "fold_warnings",
    "is_image_name",
    "missing_side",
    "needs_download",
    "read_ledger",
    "record_failures",
    "require_its_own",
    "scan",
]
