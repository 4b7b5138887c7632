"""The ledger: every file that is not used, with the reason; nothing is dropped without a line in it.

`ledger.csv` holds what the scan found (written anew by each scan) and which contents could not be decoded. The latter are
remembered by content and decode policy, so that a broken image is not tried again until its bytes or the policy change.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DatasetError
from pipeline.experiment import from_cell, to_cell
from pipeline.io.digests import Digests, digests_from_hex, digests_to_hex
from pipeline.io.files import make_folder, read_file, write_text_atomic

LEDGER_FILE = "ledger.csv"
COLUMNS = ("path", "digest", "status", "reason", "policy")

REMARKS = frozenset({"not_an_image", "not_in_a_class", "leak", "conflict"})
"""Statuses that are worth knowing and are not failures of an image."""


class LedgerEntry(NamedTuple):
    """One file that is not used, or worth a remark.

    `digest` is the content's hex digest and `policy` names the decode policy it failed under; both '' in entries of a scan.
    """

    path: str
    digest: str
    status: str
    reason: str
    policy: str = ""


TRANSIENT = frozenset({"unavailable"})
"""Statuses that say nothing about a content: the file could not be read this time."""


def read_ledger(folder: Path) -> list[LedgerEntry]:
    """Read a folder's ledger; an empty list where there is none.

    Raises
    ------
    DatasetError
        When it cannot be read as a ledger.
    """
    path = folder / LEDGER_FILE
    try:
        rows = list(csv.reader(io.StringIO(read_file(path).decode("utf-8"), newline="")))
    except FileNotFoundError:
        return []
    except PermissionError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); delete it, and failed images are tried again") from None
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise DatasetError(
            f"{path}: expected the columns {', '.join(COLUMNS)}; delete it, and failed images are tried again"
        )
    return [LedgerEntry(*map(from_cell, row)) for row in rows[1:]]


def write_ledger(folder: Path, entries: Iterable[LedgerEntry]) -> None:
    """Write a folder's ledger, sorted by path; the file stays untouched when nothing changed."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([to_cell(cell) for cell in entry] for entry in sorted(set(entries)))
    path = folder / LEDGER_FILE
    make_folder(folder)
    if not path.exists() or path.read_bytes() != text.getvalue().encode():
        write_text_atomic(path, text.getvalue())


def record_failures(folder: Path, entries: Sequence[LedgerEntry], policy: str) -> None:
    """Add contents that could not be decoded under a policy; each needs its digest, and replaces what was known of it.

    What failed under another policy is forgotten: it is tried again under this one. A file that could not be read this
    time is listed too, but only until the next scan looks again.
    """
    if not policy or not all(entry.digest for entry in entries):
        raise ValueError("a failed image needs its digest and its decode policy")
    fresh = {entry.digest for entry in entries}
    known = read_ledger(folder)
    kept = [entry for entry in known if not entry.policy or (entry.policy == policy and entry.digest not in fresh)]
    if entries or len(kept) < len(known):
        added = [
            entry._replace(digest="", policy="") if entry.status in TRANSIENT else entry._replace(policy=policy)
            for entry in entries
        ]
        write_ledger(folder, [*kept, *added])


def failed_digests(folder: Path, policy: str) -> Digests:
    """Return the contents known to fail under a decode policy: uint64 of shape (n, 2)."""
    return digests_from_hex(sorted({entry.digest for entry in read_ledger(folder) if entry.policy == policy}))


def current_entries(
    scanned: Sequence[LedgerEntry], known: Sequence[LedgerEntry], paths: Sequence[str], digests: Digests
) -> list[LedgerEntry]:
    """Join a scan's entries with the remembered failures whose content is still in the data set, under its path of now."""
    failed = {entry.digest: entry for entry in known if entry.policy}
    if not failed:
        return list(scanned)
    kept = [
        failed[digest]._replace(path=path)
        for path, digest in zip(paths, digests_to_hex(digests), strict=True)
        if digest in failed
    ]
    return [*scanned, *kept]


def check_failures(failed: int, total: int, max_failures: float, ledger: Path) -> None:
    """Stop when too many of `total` images failed: a share when `max_failures` is below 1, a number from 1 up.

    Raises
    ------
    DatasetError
        With the count, the limit and the ledger to look into.
    """
    limit = max_failures * total if max_failures < 1 else max_failures
    if failed > limit:
        allowed = f"{max_failures:.0%} of them" if max_failures < 1 else f"{max_failures:g}"
        raise DatasetError(
            f"{failed:,} of {total:,} images failed, dataset.max_failures allows {allowed}; "
            f"{ledger} names each with its reason: mend or remove them, or raise dataset.max_failures"
        )
