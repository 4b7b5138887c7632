"""What watches a run or hangs on the network while it lasts: dropout, the profiler, TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import TrainingError
from pipeline.finetuning.plan import last_linear
from pipeline.io.files import make_folder, write_text_atomic

PROFILE_ROWS = 40


@contextmanager
def dropout(network: nn.Module, share: float) -> Iterator[None]:
    """Drop a share of what enters the last layer; a hook, so the names in the network's state stay as they are."""
    if share == 0:
        yield
        return
    layer = network.get_submodule(last_linear(network))

    def drop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (functional.dropout(inputs[0], share, module.training),)

    handle = layer.register_forward_pre_hook(drop)
    try:
        yield
    finally:
        handle.remove()


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
