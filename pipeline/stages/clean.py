"""Clean: a manifest that proposes which images to leave out and which to keep together, with reasons; nothing is relabelled.

Rows with split `excluded` are left out when the manifest is used; another split in that cell restores the row.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.data.index import EXCLUDED, SEPARATOR
from pipeline.errors import DatasetError, number_of
from pipeline.evaluation.audit import Findings, LabelIssues, read_findings
from pipeline.experiment import Artifacts
from pipeline.io.files import require_place, write_text_atomic
from pipeline.report.material import gather

LEFT_OUT, GROUPED = "left out", "grouped"


@dataclass(frozen=True)
class CleanRun:
    """The proposed changes, as numbers of images."""

    output: Path
    images: int
    suspicious: int
    doubted: int
    """Labels that look wrong too, but no more of them than expected if all were right; these images stay."""
    alike: int
    """Training images that are near-duplicates of a test image."""
    grouped: int
    outliers: int
    arguments: str
    """The arguments of `manyheads` that use the manifest."""

    def summary_lines(self) -> list[str]:
        """Return the proposal, and the command to use it."""
        return [
            f"{number_of(self.images, 'image')}; no label is changed, and `reason` says why of each that is touched:",
            f"  left out      {self.suspicious:,} training images whose label is likely wrong, {self.alike:,} nearly the same as a test image",
            f"  kept together {number_of(self.grouped, 'image')} nearly the same as another, by `group`",
            f"  noted         {number_of(self.outliers, 'image')} like no other; {self.doubted:,} labels to check, as many as would be doubted were "
            "all right",
            f"written to {self.output}; look through it: another split in place of {EXCLUDED} keeps a row. Then",
            f"  manyheads {self.arguments}",
        ]


def run(config: Config, output: Path) -> CleanRun:
    """Write the manifest of an experiment with tuned heads; an existing file, which may have been edited, is never overwritten."""
    if output.exists():
        raise DatasetError(f"{output}: exists already, and may have been edited; name another file with --output")
    require_place(output)
    files, data = Artifacts(config.output, config.store), config.dataset
    index, findings = DatasetIndex.read(files.dataset), read_findings(files.audit)
    issues = gather(files.root).label_issues
    rows = ManifestCells.of(index, findings, issues)
    placed = (data.split_column or "split", data.group_column or "group")
    origin = {} if index.domains is None else {data.domain_column: index.domains}
    header = [data.path_column or "path", *data.label_columns, *placed, *origin, "change", "reason"]
    labels = [index.column(name) for name in index.names]
    reasons = map("; ".join, rows.reasons)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")  # without `to_cell`: readers of manifests take cells literally
    writer.writerow(header)
    writer.writerows(
        zip(index.paths, *labels, rows.splits, rows.groups, *origin.values(), rows.changes, reasons, strict=True)
    )
    write_text_atomic(output, text.getvalue())
    section = data.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    section |= {"source": "manifest", "path": str(output), "root": str(index.root)}
    section |= {"label_separator": SEPARATOR} if data.label_separator else {}
    changes = {"dataset": json.dumps(section, ensure_ascii=False), "output": str(files.root.parent / output.stem)}
    arguments = [quote(str(files.config)), *(f"--set {quote(f'{key}={value}')}" for key, value in changes.items())]
    doubted, grouped, odd = len(issues.found) - rows.suspicious, rows.changes.count(GROUPED), len(findings.outliers)
    return CleanRun(output, len(index), rows.suspicious, doubted, rows.alike, grouped, odd, " ".join(arguments))


@dataclass
class ManifestCells:
    """The manifest's cells that may differ from the index: lists with an item per image."""

    splits: list[str]
    groups: list[str]
    changes: list[str]
    reasons: list[list[str]]
    suspicious: int = 0
    alike: int = 0

    @staticmethod
    def of(index: DatasetIndex, findings: Findings, issues: LabelIssues) -> ManifestCells:
        """Decide on every image."""
        n, splits = len(index), index.splits.tolist()
        groups = [""] * n if index.groups is None else index.groups.tolist()
        found = ManifestCells(
            splits, groups, [""] * n, [[] for _ in range(n)], len(issues.found) - round(issues.expected)
        )
        for row in np.flatnonzero(index.splits == EXCLUDED).tolist():
            found._leave_out(row, "a copy of an image on the other side of the split, or left out before")
        place = {path: row for row, path in enumerate(index.paths.tolist())}
        for number, issue in enumerate(issues.found):
            row = place[issue.path]
            why = f"held out, the best head gives {issue.label!r} {issue.probability:.3f} and takes it for {issue.suggested!r}"
            if number < found.suspicious:
                found._leave_out(row, f"its label is likely wrong: {why}")
            else:
                found.reasons[row].append(f"check its label: {why}")
        pairs = [(place[each.path], place[each.other]) for each in findings.near_duplicates]
        found.alike = sum(found._take_apart(rows, index) for rows in _joined(n, pairs))
        found._name_groups(pairs)
        for outlier in findings.outliers:
            found.reasons[place[outlier.path]].append(
                f"like no other image: {outlier.score:.1f} deviations above the median"
            )
        return found

    def _name_groups(self, pairs: list[tuple[int, int]]) -> None:
        """Put near-duplicate images, and the groups they belong to, into one group."""
        first: dict[str, int] = {}
        same = [(first.setdefault(name, row), row) for row, name in enumerate(self.groups) if name]
        touched = {row for pair in pairs for row in pair}
        alike = [rows for rows in _joined(len(self.groups), pairs + same) if touched.intersection(rows)]
        for number, rows in enumerate(alike, 1):
            name = " + ".join(sorted({self.groups[row] for row in rows} - {""})) or f"alike {number}"
            for row in rows:
                self.groups[row] = name

    def _leave_out(self, row: int, why: str) -> None:
        self.splits[row], self.changes[row] = EXCLUDED, LEFT_OUT
        self.reasons[row].append(why)

    def _take_apart(self, rows: list[int], index: DatasetIndex) -> int:
        """Leave out the training images among near-duplicates of a test image; return their number."""
        tested = next((row for row in rows if index.splits[row] == "test"), None)
        left = 0
        for row in rows:
            other = tested if tested not in (None, row) else next(each for each in rows if each != row)
            why = f"nearly the same as {index.paths[other]}, labelled {index.said(other)!r}"
            if tested is not None and index.splits[row] in ("train", "validation"):
                left += 1
                self._leave_out(row, f"{why}, a test image")
            else:
                self.changes[row] = self.changes[row] or GROUPED
                self.reasons[row].append(why)
        return left


def _joined(n: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Return the sets of rows, of n, connected by pairs, each sorted."""
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    names = connected_components(coo_array((np.ones(len(pairs)), (ends[0], ends[1])), shape=(n, n)), directed=False)[1]
    order = np.argsort(names, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(names[order])) + 1)
    return sorted(part.tolist() for part in parts if len(part) > 1)
