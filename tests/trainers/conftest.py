"""What all of these tests take."""

import pytest


@pytest.fixture(autouse=True)
def _no_report(no_report: None) -> None:
    """See `no_report`."""
