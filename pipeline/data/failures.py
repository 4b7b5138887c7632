"""Failures: every file that is not used, with the reason; no file is dropped without an entry in the list.

`failures.csv` lists the scan's findings (rewritten by each scan) and the contents that could not be decoded. The latter are
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

FAILURES_FILE = "failures.csv"
REMARKS = frozenset({"not_an_image", "not_in_a_class", "leak", "conflict"})
"""Statuses of remarks, which do not count as failed images."""


class Failure(NamedTuple):
    """One file that is not used, or has a remark.

    `digest` is the content's hex digest and `policy` the name of the decode policy it failed under; both are '' for a scan's findings.
    """

    path: str
    digest: str
    status: str
    reason: str
    policy: str = ""


def shown(path: str) -> str:
    """Return a path for display: bytes that are not UTF-8 and control characters are escaped."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def noticed(path: str, status: str, reason: str) -> Failure:
    """Return an entry for a file that a scan found."""
    return Failure(shown(path), "", status, reason)


def read_failures(folder: Path) -> list[Failure]:
    """Read a folder's list; empty if there is none; DatasetError if the file is not such a list."""
    path = folder / FAILURES_FILE
    try:
        header, *rows = csv.reader(io.StringIO(read_file(path).decode("utf-8"), newline=""))
        if tuple(header) != Failure._fields:
            raise ValueError(f"expected the columns {', '.join(Failure._fields)}")
        return [Failure._make(map(from_cell, row)) for row in rows]
    except FileNotFoundError:
        return []
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); delete it, and failed images are tried again") from None


def write_failures(folder: Path, failures: Iterable[Failure]) -> None:
    """Write a folder's list, sorted by path; an unchanged file is not touched."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Failure._fields)
    writer.writerows([to_cell(cell) for cell in failure] for failure in sorted(set(failures)))
    path = folder / FAILURES_FILE
    make_folder(folder)
    if not path.exists() or path.read_bytes() != text.getvalue().encode():
        write_text_atomic(path, text.getvalue())


def record_failures(folder: Path, failures: Sequence[Failure], policy: str) -> None:
    """Add contents that could not be decoded under a policy; each needs its digest, and replaces earlier entries of that content.

    Failures under another policy are removed, to be tried again under this one. A file that could not be read this
    time is listed too, but only until the next scan looks again.
    """
    fresh = {failure.digest for failure in failures}
    known = read_failures(folder)
    kept = [one for one in known if not one.policy or (one.policy == policy and one.digest not in fresh)]
    if failures or len(kept) < len(known):
        for one in failures:
            # An unreadable file says nothing about its content.
            kept.append(
                one._replace(digest="", policy="") if one.status == "unavailable" else one._replace(policy=policy)
            )
        write_failures(folder, kept)


def failed_digests(folder: Path, policy: str) -> Digests:
    """Return the contents known to fail under a decode policy: uint64 of shape (n, 2)."""
    return digests_from_hex(sorted({one.digest for one in read_failures(folder) if one.policy == policy}))


def remembered(known: Sequence[Failure], paths: Sequence[str], digests: Digests) -> list[Failure]:
    """Return the known failures whose content, digests uint64 (n, 2), is still in the data set, with their current paths."""
    failed = {failure.digest: failure for failure in known if failure.policy}
    if not failed:
        return []
    named = zip(paths, digests_to_hex(digests), strict=True)
    return [failed[digest]._replace(path=path) for path, digest in named if digest in failed]


def check_failures(failed: int, total: int, max_failures: float, listed: Path) -> None:
    """Raise DatasetError if too many of `total` images failed; `max_failures` is a fraction if below 1, otherwise a count."""
    limit = max_failures * total if max_failures < 1 else max_failures
    if failed > limit:
        allowed = f"{max_failures:.0%} of them" if max_failures < 1 else f"{max_failures:g}"
        raise DatasetError(
            f"{failed:,} of {total:,} images failed, dataset.max_failures allows {allowed}; "
            f"{listed} names each with its reason: mend or remove them, or raise dataset.max_failures"
        )
