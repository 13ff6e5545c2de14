"""What the tests of all packages share: benchmarks' fixture, parity cases of a folder, and which tests are slow."""

import pytest

pytest_plugins = ["comparison"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-cases", metavar="DIR", help="also run every parity case file of this folder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the contracts do in two processes; a mark in the contracts would be unknown to plugins' own pytest."""
    for item in items:
        if item.name == "test_replicas_never_diverge":
            item.add_marker("slow")
