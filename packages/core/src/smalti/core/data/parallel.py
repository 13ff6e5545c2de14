"""Work done by threads whose results come in the order of the work."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 8  # items handed to a thread at once: handing over costs as much as a tenth of decoding a small image


def in_order(
    function: Callable[[T], R], items: Iterable[T], workers: int, chunk: int = CHUNK
) -> Generator[R, None, None]:
    """`map(function, items)`, with `workers` threads that run ahead; 0 does the work in this one.

    Items are taken by the caller's thread, and handed over `chunk` at a time. An error of `items` comes after the
    results before it; one of `function` may take up to `chunk - 1` results before it away.
    """
    if not workers:
        yield from map(function, items)
        return
    chunks = _chunks(items, chunk)
    pool = ThreadPoolExecutor(workers, "smalti-data")
    pending: deque[Future[list[R]]] = deque()
    failure: Exception | None = None
    more = True
    try:
        while more or pending:
            while more and len(pending) <= 2 * workers:
                part, failure, more = next(chunks)
                pending.append(pool.submit(lambda part: list(map(function, part)), part))
            yield from pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(items: Iterable[T], size: int) -> Iterator[tuple[list[T], Exception | None, bool]]:
    """Up to `size` items at a time, the error that ended them, and whether more may come."""
    iterator = iter(items)
    while True:
        chunk: list[T] = []
        try:
            for item in iterator:
                chunk.append(item)
                if len(chunk) == size:
                    break
            else:
                yield chunk, None, False
                return
        except Exception as error:  # noqa: BLE001  # to be raised in its turn
            yield chunk, error, False
            return
        yield chunk, None, True


def ahead(items: Generator[T, None, None], count: int) -> Generator[T, None, None]:
    """The same items, taken by a thread of its own that is up to `count` items ahead; an error comes in its turn."""
    made: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(count)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stop.is_set():
            try:
                made.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None, True)):
                    return
            put((None, None, False))
        except BaseException as error:  # noqa: BLE001  # to be raised where the items are taken
            put((None, error, False))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="smalti-data-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, more = made.get()
            if error is not None:
                raise error
            if not more:
                return
            yield item  # type: ignore[misc]  # an entry without error or end holds an item
    finally:
        stop.set()
        thread.join()
