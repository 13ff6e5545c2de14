"""What the benchmarks of Gaussians share: one thread."""

import pytest


@pytest.fixture
def threads() -> int:
    """A ratio that does not depend on what else the machine does with its other cores."""
    return 1
