"""Progress of long work: a bar with a rate and an ETA on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

Piece = TypeVar("Piece")
LOG_SECONDS = 15.0
"""How often a bar is redrawn where nobody watches it live."""


class Progress:
    """The bar of one piece of work."""

    def __init__(self, bar: tqdm[Any], interval: float = LOG_SECONDS) -> None:
        self._bar, self._interval = bar, interval
        self._noted = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Say that `count` more are done."""
        self._bar.update(count)

    def passed(self, piece: Piece) -> Piece:
        """Say that one more is done, and return it: for `map`."""
        self.update()
        return piece

    def note(self, text: str) -> None:
        """Show a short text behind the bar, such as the best score so far; soon, also where no piece ends for hours."""
        due = time.monotonic() - self._noted >= self._interval
        if due:
            self._noted = time.monotonic()
        self._bar.set_postfix_str(text, refresh=due)


@contextmanager
def bar(total: int, unit: str, label: str, initial: int = 0) -> Iterator[Progress]:
    """Show a bar on standard error for `total` pieces of work, `initial` of them done before."""
    live = sys.stderr.isatty()
    interval = 0.2 if live else LOG_SECONDS
    with tqdm(
        total=total,
        initial=initial,
        unit=f" {unit}",
        desc=label,
        mininterval=interval,
        maxinterval=10.0 if live else LOG_SECONDS,
        dynamic_ncols=live,
        leave=True,
        disable=total <= initial,
    ) as raw:
        yield Progress(raw, interval)
