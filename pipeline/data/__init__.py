"""The data set: sources of images become one index of path, label, split, group and content digest."""

from __future__ import annotations

from pipeline.data.failures import REMARKS, Failure, check_failures, failed_digests, read_failures, record_failures
from pipeline.data.index import DatasetIndex
from pipeline.data.scan import require_its_own, scan
from pipeline.data.sources import needs_download
from pipeline.data.summary import ScanResult, described, fold_warnings, missing_side, passed_over_lines
from pipeline.data.walk import Walk
