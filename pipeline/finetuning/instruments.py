"""What watches a run while it lasts: torch's profiler and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.errors import TrainingError
from pipeline.io.files import make_folder, write_text_atomic

PROFILE_ROWS = 40


@contextmanager
def profiler(steps: int, path: Path) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; torch's profiler watches `steps` of them after the first and writes its table."""
    if steps == 0:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        make_folder(path.parent)
        write_text_atomic(path, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILE_ROWS))

    plan = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=plan, on_trace_ready=write) as profile:
        yield profile.step


@contextmanager
def tensorboard(folder: Path | None) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that sends an evaluation's numbers, with its step, to TensorBoard; without a folder to nowhere.

    Raises
    ------
    TrainingError
        When the package is not installed.
    """
    if folder is None:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(
            "finetune.tensorboard: the package is not installed; run `pip install tensorboard` or set it to false"
        ) from None
    with SummaryWriter(str(folder)) as board:

        def show(record: Mapping[str, float]) -> None:
            for name in record.keys() - {"step"}:
                board.add_scalar(name, record[name], record["step"])
            board.flush()

        yield show
