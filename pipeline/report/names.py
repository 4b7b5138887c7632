"""Names shortened to fit a chart, so that different names stay different."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data.index import SEPARATOR

GAP = "…"
SEPARATORS = " -_/."


def in_words(answer: Any) -> str:
    """Write what is said of an image, a text or numbers of shape (k,), for people."""
    if isinstance(answer, str):
        return answer.replace(SEPARATOR, ", ") or "no label"
    return ", ".join(f"{number:.4g}" for number in np.atleast_1d(answer))


def shorten(name: str, length: int) -> str:
    """Return a name of at most `length` characters with its middle left out: names mostly differ at their ends."""
    if len(name) <= length:
        return name
    front = length // 2
    return name[:front].rstrip() + GAP + name[len(name) - (length - front - 1) :].lstrip()


def shorten_all(names: Sequence[str], length: int) -> list[str]:
    """Return every name in about `length` characters, different names kept different.

    Where one is too long, words that all begin or end with are left out first ("…blue circle…" of many photographs of
    something on a plain background), then the middle. Names that differ only there lose what they share among themselves,
    and are numbered if that does not tell them apart either.
    """
    unique = list(dict.fromkeys(names))
    if all(len(name) <= length for name in unique):
        return list(names)
    found = dict(zip(unique, _cut(unique, length, SEPARATORS), strict=True))
    for text, count in Counter(found.values()).items():
        if count == 1:
            continue
        alike = [name for name in unique if found[name] == text]
        again = _cut(alike, length, "")
        if len(set(again)) < len(alike) or set(again) & set(found.values()):
            again = [f"{text} ({number})" for number in range(1, len(alike) + 1)]
        found.update(zip(alike, again, strict=True))
    return [found[name] for name in names]


def _cut(names: Sequence[str], length: int, separators: str) -> list[str]:
    """Leave out what all names begin and end with, whole words where there are separators; then each name's middle."""
    front = _whole_words(_beginning(names), separators)
    back = _whole_words(_beginning([name[front:][::-1] for name in names]), separators)
    inner = [name[front : len(name) - back] for name in names]
    if len(names) < 2 or not all(inner):
        front, back, inner = 0, 0, list(names)
    room = length - bool(front) - bool(back)
    return [GAP * bool(front) + shorten(name, room) + GAP * bool(back) for name in inner]


def _whole_words(shared: str, separators: str) -> int:
    return max(shared.rfind(sign) + 1 for sign in separators) if separators else len(shared)


def _beginning(names: Sequence[str]) -> str:
    """Return the characters that all names begin with."""
    first, last = min(names), max(names)
    same = next((place for place, sign in enumerate(first) if not last.startswith(sign, place)), len(first))
    return first[:same]
