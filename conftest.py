"""What the tests of all packages share: the fixture of the benchmarks, and the option for a folder of parity cases."""

import pytest

pytest_plugins = ["comparison"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-cases", metavar="DIR", help="also run every parity case file of this folder")
