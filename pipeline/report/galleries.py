"""Sections made of pictures: the map of the embedding, the worst mistakes, labels to check, near-duplicates, outliers."""

from __future__ import annotations

import json
from html import escape

import numpy as np

from pipeline.evaluation import class_columns
from pipeline.report.drawing import CATEGORIES
from pipeline.report.material import Material
from pipeline.report.names import shorten_all
from pipeline.report.pictures import gallery, sheet

MOST_PICTURES = 24
MOST_PAIRS = 18
CHIP = 28
"""Characters of a class on the map's buttons."""


def space_map(material: Material, drawing: str | None) -> str:
    """Show the drawn map of the embedding with what the page's script needs to show the image at a dot."""
    space, index = material.map, material.index
    if drawing is None or space is None or index is None:
        return ""
    picture, columns = sheet(index, space.rows.tolist())
    labels = index.labels[space.rows].astype(str)
    data = {
        "paths": index.paths[space.rows].tolist(),
        "splits": index.splits[space.rows].tolist(),
        "codes": class_columns(labels, index.classes).tolist(),
        "classes": list(index.classes),
        "columns": columns,
        "sheet": picture,
    }
    chips = "".join(
        f'<button aria-pressed="false" title="{escape(label)}"><i style="background:var(--c{number % len(CATEGORIES)})"></i>{escape(short)}</button>'
        for number, (label, short) in enumerate(zip(index.classes, shorten_all(index.classes, CHIP), strict=True))
    )
    total = (
        f"{len(space.rows):,} of {len(index):,} images"
        if len(space.rows) < len(index)
        else f"all {len(index):,} images"
    )
    repeated = (
        f" {len(CATEGORIES)} colours serve {len(index.classes)} classes, so several share one."
        if len(index.classes) > len(CATEGORIES)
        else ""
    )
    return (
        f'<h2>Map of the embedding</h2><p class="quiet">{escape(material.embedding or "")}, {space.method} of {total}: images that lie close together look alike to the network; '
        f"the axes have no unit. Point at a dot or touch it to see its image; choose a class to see it alone.{repeated}</p>"
        f'<div class="chips" id="map-classes">{chips}</div><div class="map">{drawing}</div>'
        f'<script type="application/json" id="map-data">{_json(data)}</script>'
    )


def _json(value: object) -> str:
    """Return JSON that cannot end its script element."""
    return (
        json.dumps(value, ensure_ascii=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def mistakes(material: Material) -> str:
    """Show the test images on which the best row was most sure and wrong."""
    best = material.best
    if best is None:
        return ""
    part = best.test
    wrong = np.flatnonzero(~part.correct)
    if not len(wrong):
        return "<h2>Worst mistakes</h2><p>The best row made no mistake on the test images.</p>"
    p = np.ones((len(part), 1)) if part.probabilities is None else part.probabilities
    own = p[np.arange(len(part)), part.y_true] if part.probabilities is not None else 0.0
    sure = p.max(axis=1)
    order = wrong[np.argsort(-(sure - own)[wrong], kind="stable")][:MOST_PICTURES]
    assert part.paths is not None
    pictures = gallery(material.index, part.paths[order].tolist())
    said, true, figures = part.predicted, part.labels, []
    for row in order.tolist():
        share = f" · {100 * sure[row]:.0f}&nbsp;%" if part.probabilities is not None else ""
        caption = f"<b>{escape(said[row])}</b>{share}<br><span>is {escape(true[row])}</span>"
        figures.append(_figure(str(part.paths[row]), pictures, caption))
    which = "; these with most conviction" if len(wrong) > len(order) else ""
    text = (
        f"{len(wrong):,} of {len(part):,} test images were labelled wrong{which}. In bold what {escape(material.leaderboard.best.key)} said"
        f"{' and how sure it was' if part.probabilities is not None else ''}, below it the image's own label."
    )
    return f'<h2>Worst mistakes</h2><p class="quiet">{text}</p><div class="gallery">{"".join(figures)}</div>'


def label_issues(material: Material) -> str:
    """Show training images whose label the head does not believe."""
    issues = material.findings.label_issues
    found = issues.found
    if not found:
        return ""
    shown = found[:MOST_PICTURES]
    pictures = gallery(material.index, [item.path for item in shown])
    figures = [
        _figure(
            item.path,
            pictures,
            f"<span>labelled</span> {escape(item.label)}<br><b>{escape(item.suggested)}</b> <span>?</span>",
        )
        for item in shown
    ]
    one = len(found) == 1
    text = (
        f"{len(found):,} training {'image has a label' if one else 'images have labels'} that the head, fitted without "
        f"{'it' if one else 'them'}, does not believe; the least probable first. Were all labels right, about "
        f"{issues.expected:,.0f} would be named all the same. {_trust(material)} Look before you change anything; "
        "all are in <code>audit/label_issues.csv</code>."
    )
    return f'<h2>Labels to check</h2><p class="quiet">{text}</p><div class="gallery">{"".join(figures)}</div>'


def _trust(material: Material) -> str:
    """Say how far the head that doubts labels can be trusted itself."""
    best = material.best
    if best is None or best.out_of_fold is None:
        return ""
    return f"It is right on {100 * float(best.out_of_fold.correct.mean()):.0f} % of them all, so a doubt may be its own mistake."


def near_duplicates(material: Material) -> str:
    """Show pairs of images that are nearly the same, those across splits first."""
    found = material.findings.near_duplicates
    if not found:
        return ""
    shown = found[:MOST_PAIRS]
    pictures = gallery(material.index, [path for pair in shown for path in (pair.path, pair.other)])
    pairs = []
    for pair in shown:
        splits = (
            f'<span class="tag blue">{escape(pair.split)} / {escape(pair.other_split)}</span>'
            if pair.across
            else f'<span class="tag">{escape(pair.split)}</span>'
        )
        labels = (
            escape(pair.label)
            if pair.label == pair.other_label
            else f"<b>{escape(pair.label)} / {escape(pair.other_label)}</b>"
        )
        pairs.append(
            f'<figure class="pair">{_frame(pair.path, pictures)}{_frame(pair.other, pictures)}<figcaption>{splits} {labels}<br><span>{escape(_file(pair.path))}, {escape(_file(pair.other))}</span></figcaption></figure>'
        )
    across = sum(pair.across for pair in found)
    one = len(found) == 1
    text = (
        f"{len(found):,} {'pair of images is' if one else 'pairs of images are'} nearly the same; "
        f"{across:,} across splits, where the test sees what was trained on. All are in <code>audit/near_duplicates.csv</code>."
    )
    return f'<h2>Near-duplicates</h2><p class="quiet">{text}</p><div class="pairs">{"".join(pairs)}</div>'


def outliers(material: Material) -> str:
    """Show images that are far from every other."""
    found = material.findings.outliers
    if not found:
        return ""
    shown = found[: MOST_PICTURES // 2]
    pictures = gallery(material.index, [item.path for item in shown])
    figures = [
        _figure(item.path, pictures, f"{escape(item.label)}<br><span>{escape(_file(item.path))}</span>")
        for item in shown
    ]
    text = f"{len(found):,} {'image is' if len(found) == 1 else 'images are'} far from all others in the embedding. All are in <code>audit/outliers.csv</code>."
    return f'<h2>Outliers</h2><p class="quiet">{text}</p><div class="gallery">{"".join(figures)}</div>'


def _figure(path: str, pictures: dict[str, str], caption: str) -> str:
    return f"<figure>{_frame(path, pictures)}<figcaption>{caption}</figcaption></figure>"


def _frame(path: str, pictures: dict[str, str]) -> str:
    inside = (
        f'<img src="{pictures[path]}" alt="" loading="lazy">'
        if path in pictures
        else '<span class="quiet">no image</span>'
    )
    return f'<div class="frame tip" tabindex="0" data-tip="{escape(path)}">{inside}</div>'


def _file(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return name if len(name) <= 22 else f"{name[:10]}…{name[-9:]}"
