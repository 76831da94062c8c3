"""Iterators that close what they read from: applied to a function, and made ahead of use by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped(function: Callable[[Item], Result], items: Iterator[Item]) -> Generator[Result]:
    """The results of a function, as `map`; closing closes `items`."""
    try:
        for item in items:
            yield function(item)
    finally:
        _close(items)


def ahead(items: Iterator[Item], depth: int, name: str) -> Generator[Item]:
    """The items in order, made by a thread called `name` that is at most `depth` items ahead of the consumer.

    An error of the thread is raised where its item would have come. Closing stops the thread and closes `items`.
    """
    ready: queue.Queue[Item | _Failure | None] = queue.Queue(max(1, depth))
    stop = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                ready.put(item)
            ready.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            ready.put(_Failure(error))

    thread = threading.Thread(target=fill, name=name, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        while thread.is_alive():  # the thread may wait for room in the queue
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                thread.join(timeout=0.01)
        _close(items)


def _close(items: object) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        close()


class _Failure:
    """What an item is when making it failed."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
