"""Running the parts of a pass side by side, one thread per part.

A matrix product that is spread over all cores waits at its end for the slowest of them. On a machine where other
threads compute too (DSPy's own, for a start), one of them is often not running, and all wait: a pass takes several
times as long as its arithmetic. Two halves of a pass on one core each never wait for one another. Small passes are
not split: reading the weights is what they spend their time on, and every part would read them again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from asyndbt_dspy.lms.local.layout import PassItem

Result = TypeVar("Result")
# A part of a pass should have at least this many tokens.
TOKENS_PER_LANE = 320
MOST_LANES = 4


class Lanes:
    """Threads that run parts of passes, each with its share of the cores.

    Args:
        device: Where the model is; only CPU passes are split.
    """

    def __init__(self, device: torch.device) -> None:
        cores = torch.get_num_threads()
        self.count = min(cores, MOST_LANES) if device.type == "cpu" else 1
        self._share = max(1, cores // self.count)
        self._pool: ThreadPoolExecutor | None = None

    def run(self, parts: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of all parts, in order; the first error once all have ended."""
        if len(parts) == 1:
            return [parts[0]()]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                self.count,
                thread_name_prefix="asyndbt-local-lane",
                initializer=_use_cores,
                initargs=(self._share,),
            )
        futures = [self._pool.submit(_without_gradients, part) for part in parts]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


def _without_gradients(part: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return part()


def _use_cores(count: int) -> None:
    """Let this thread compute on `count` cores, and leave every other thread's number as it is.

    PyTorch keeps the number per thread, but a thread that first computes later takes over the last number that was
    set anywhere; so the old one is set again, from a thread that ends at once.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    restorer = threading.Thread(target=torch.set_num_threads, args=(before,))
    restorer.start()
    restorer.join()


def split_pass(items: Sequence[PassItem], lanes: int) -> list[list[list[PassItem]]]:
    """Phases of parts: the parts of a phase are independent of one another, and need earlier phases only.

    Prefix nodes come in a phase of their own, since items of several parts may need them.
    """
    tokens = sum(len(item.tokens) for item in items)
    if lanes == 1 or tokens < 2 * TOKENS_PER_LANE:
        return [[list(items)]]
    nodes = [item for item in items if item.node is not None]
    others = [item for item in items if item.node is None]
    phases: list[list[list[PassItem]]] = []
    if nodes:
        phases.append(_balanced(_families(nodes), lanes))
    if others:
        ordered = sorted(others, key=lambda item: tuple(id(node) for node in item.path))
        phases.append(_consecutive(ordered, lanes))
    return phases


def _families(nodes: Sequence[PassItem]) -> list[list[PassItem]]:
    """Node items grouped so that one never needs a node of another group."""
    family_of: dict[int, list[PassItem]] = {}
    families: list[list[PassItem]] = []
    for item in sorted(nodes, key=lambda item: item.start):
        above = next((family_of[id(node)] for node in item.path if id(node) in family_of), None)
        if above is None:
            above = []
            families.append(above)
        above.append(item)
        family_of[id(item.node)] = above
    return families


def _balanced(families: Sequence[list[PassItem]], lanes: int) -> list[list[PassItem]]:
    parts: list[list[PassItem]] = [[] for _ in range(min(lanes, len(families)))]
    sizes = [0] * len(parts)
    for family in sorted(families, key=_tokens, reverse=True):
        smallest = sizes.index(min(sizes))
        parts[smallest] += family
        sizes[smallest] += _tokens(family)
    return parts


def _consecutive(items: Sequence[PassItem], lanes: int) -> list[list[PassItem]]:
    """Cut into runs of about equal size, so that items with one prefix mostly stay together."""
    total = _tokens(items)
    count = max(1, min(lanes, total // TOKENS_PER_LANE, len(items)))
    parts: list[list[PassItem]] = [[] for _ in range(count)]
    seen = 0
    for item in items:
        middle = seen + len(item.tokens) // 2
        parts[min(count - 1, middle * count // total)].append(item)
        seen += len(item.tokens)
    return [part for part in parts if part]


def _tokens(items: Sequence[PassItem]) -> int:
    return sum(len(item.tokens) for item in items)
