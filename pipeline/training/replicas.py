"""Gradients of one step, from several copies of the network side by side where that is asked for.

On a CPU that is shared with other work, two threads inside each operation wait for each other a thousand times a step;
two copies of the network with half the batch and one thread each wait once. The parts of a batch belong to fixed
copies and are added in a fixed order, so the result does not depend on which is done first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, int], Tensor]
"""The loss of a network on part `i` of a step's batch, to be minimised."""


class Replicas:
    """Copies of one network, each with a thread of its own; the first is the network itself."""

    def __init__(self, network: nn.Module, count: int, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool
        self._networks = [network, *(copy.deepcopy(network) for _ in range(count - 1))]

    def gradients(self, loss: Loss, parts: int) -> float:
        """Add the gradient of the mean loss over `parts` to the network's `.grad` and return that mean."""
        self._spread()
        losses = [0.0] * parts

        def work(replica: int) -> None:
            for part in range(replica, parts, len(self._networks)):
                value = loss(self._networks[replica], part)
                value.backward()  # type: ignore[no-untyped-call]
                losses[part] = value.item()

        if self._pool is None:
            work(0)
        else:
            list(self._pool.map(work, range(len(self._networks))))
        self._gather(parts)
        return sum(losses) / parts

    def _spread(self) -> None:
        """Bring the copies to the network's weights, statistics, modes and frozen parts."""
        first, *others = self._networks
        with torch.no_grad():
            for other in others:
                for source, target in zip(first.modules(), other.modules(), strict=True):
                    target.training = source.training
                for source_p, target_p in zip(first.parameters(), other.parameters(), strict=True):
                    target_p.copy_(source_p)
                    target_p.requires_grad_(source_p.requires_grad)
                    target_p.grad = None
                for source_b, target_b in zip(first.buffers(), other.buffers(), strict=True):
                    target_b.copy_(source_b)

    def _gather(self, parts: int) -> None:
        """Sum the copies' gradients into the network's, divide by the parts, and average the BatchNorm statistics."""
        count = len(self._networks)
        with torch.no_grad():
            for parameters in zip(*(network.parameters() for network in self._networks), strict=True):
                grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
                if grads:
                    parameters[0].grad = _sum(grads).div_(parts)
            for buffers in zip(*(network.buffers() for network in self._networks), strict=True):
                if count > 1 and buffers[0].is_floating_point():
                    buffers[0].copy_(_sum(buffers).div_(count))


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone() if len(tensors) > 1 else tensors[0]
    for tensor in tensors[1:]:
        total += tensor
    return total


@contextmanager
def replicas(network: nn.Module, count: int) -> Iterator[Replicas]:
    """Yield `count` copies of a network; with more than one, every torch operation gets one thread while inside."""
    if count == 1:
        yield Replicas(network, 1, None)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield Replicas(network, count, pool)
    finally:
        torch.set_num_threads(threads)
