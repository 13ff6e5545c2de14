"""Asking for huge pages changes no byte, and hurts nobody where there are none."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from smalti.generation import huge_pages
from smalti.generation.huge_pages import COLLAPSE, SIZE, USE, ask_for_huge_pages


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the system was asked for: address, length, advice."""
    calls: list[tuple[int, int, int]] = []

    def madvise(address: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
        calls.append((address.value or 0, length.value, advice))
        return -1

    monkeypatch.setattr(huge_pages, "_madvise", lambda: madvise)
    return calls


def test_whole_pages_around_the_bytes_are_asked_for(asked: list[tuple[int, int, int]]) -> None:
    ask_for_huge_pages(5 * SIZE + 7, 2 * SIZE, USE)
    ask_for_huge_pages(5 * SIZE, SIZE - 1, USE)  # holds no page
    assert asked == [(5 * SIZE, 3 * SIZE, USE)]


@pytest.mark.parametrize("advice", [COLLAPSE, USE])
def test_the_bytes_stay(advice: int) -> None:
    values = torch.arange(3 * SIZE // 8)
    ask_for_huge_pages(values.data_ptr(), values.nbytes, advice)
    assert torch.equal(values, torch.arange(3 * SIZE // 8))


def test_nothing_happens_where_the_system_has_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(_name: Any) -> Any:
        raise OSError("no C library")

    monkeypatch.setattr(ctypes, "CDLL", library)
    huge_pages._madvise.cache_clear()
    try:
        ask_for_huge_pages(0, SIZE, USE)
        assert huge_pages._madvise() is None
    finally:
        huge_pages._madvise.cache_clear()
