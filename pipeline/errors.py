"""The errors a user can cause, and the words that messages share.

A `PipelineError` is printed on one line per problem, with exit code 2 and without a traceback. Every other exception is a bug of ours
and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


def first(lines: Sequence[str], most: int) -> list[str]:
    """Return the first `most` lines, followed by the number of omitted lines if there are more."""
    left = len(lines) - most
    return [*lines[:most], f"… and {left:,} more"] if left > 0 else list(lines)


def number_of(count: int, noun: str) -> str:
    """Return a count with its noun: `1 image`, `1,200 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, or the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class PipelineError(Exception):
    """A problem that the user can solve; the message says what was found, what was expected, and what to do.

    `problems` holds one line per problem when several were found at once.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {problem}" for problem in self.problems)])


class ConfigError(PipelineError):
    """The config file or an override is wrong."""


class DatasetError(PipelineError):
    """The images, labels or splits cannot be used as they are."""


class BackboneError(PipelineError):
    """The network, its weights, a layer or the device is not available."""


class StoreError(PipelineError):
    """The feature store is damaged, of another identity, in use, or cannot be written."""


class HeadError(PipelineError):
    """A head, its search space or its search is wrong."""


class UnfittedError(HeadError):
    """No trial of a head could be fitted on these images; other heads may still work."""


class TrainingError(PipelineError):
    """A network cannot be trained as asked."""


class BundleError(PipelineError):
    """A saved head cannot be loaded or does not fit."""
