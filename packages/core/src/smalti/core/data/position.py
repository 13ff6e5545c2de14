"""Where readers are in an endless stream of epochs that several processes share.

The epochs one after the other are one stream, numbered through; record g of it belongs to process `g % processes`.
What is consumed is everything below some number, and a few records above it where processes left out damaged images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Position(NamedTuple):
    """Where one process is.

    Attributes:
        epoch: counted from 0.
        records: number of the next record of this epoch.
        first: number in the stream of this epoch's first record.
        undecodable: images of this epoch that were left out.
        ahead: numbers in the stream, rising, of later records that are consumed already.
    """

    epoch: int = 0
    records: int = 0
    first: int = 0
    undecodable: int = 0
    ahead: tuple[int, ...] = ()


class Shared:
    """The share of one process in the stream, from a position on.

    Args:
        position: where it begins.
        rank: of the process.
        processes: how many share the stream.
    """

    def __init__(self, position: Position, rank: int, processes: int) -> None:
        self.epoch, self.first = position.epoch, position.first
        self._next = position.records
        self._rank, self._processes = rank, processes
        self._ahead = set(position.ahead)

    def start(self) -> int:
        """Number in the epoch of the first record of this process."""
        return self._next + (self._rank - self.first - self._next) % self._processes

    def is_consumed(self, place: int) -> bool:
        """Whether the record with this number in the epoch was consumed by another number of processes."""
        return self.first + place in self._ahead

    def after(self, place: int) -> Position:
        """The position after the record with this number in the epoch."""
        later = sorted(number for number in self._ahead if number > self.first + place)
        return Position(self.epoch, place + 1, self.first, 0, tuple(later))

    def next_epoch(self, records: int) -> None:
        """Go on with the next epoch, after one of so many records."""
        self.epoch, self.first = self.epoch + 1, self.first + records
        self._next = max(self._next - records, 0)  # a merged position may lie beyond the epoch's end
        self._ahead = {number for number in self._ahead if number >= self.first}


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state for any number of processes, out of the states of all processes that shared a stream, by rank.

    Every process of the new run loads it; together they go on with exactly the records that are not consumed.
    """
    positions = [Position(**state) for state in states]
    consumed = {number for position in positions for number in position.ahead}
    following = [_following(position, rank, len(states), consumed) for rank, position in enumerate(positions)]
    lowest = min(following)
    consumed |= {number for number in range(lowest, max(following)) if number < following[number % len(states)]}
    earliest = min(positions, key=lambda position: position.epoch)
    return Position(
        epoch=earliest.epoch,
        records=lowest - earliest.first,
        first=earliest.first,
        undecodable=max(position.undecodable for position in positions if position.epoch == earliest.epoch),
        ahead=tuple(sorted(number for number in consumed if number > lowest)),
    )._asdict()


def _following(position: Position, rank: int, processes: int, consumed: set[int]) -> int:
    """Number in the stream of the record that this process takes next."""
    number = position.first + position.records
    number += (rank - number) % processes
    while number in consumed:
        number += processes
    return number
