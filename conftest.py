"""What the tests of all packages share: the option that adds a folder of parity cases."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-cases", metavar="DIR", help="also run every parity case file of this folder")
