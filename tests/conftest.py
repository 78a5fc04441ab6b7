"""What every test may ask for."""

from pathlib import Path

import numpy as np
import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Real data sets kept beside the checkout; tests that use them skip where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process do not draw their report, which takes longer than training a tiny model."""
    monkeypatch.setattr("llmrl.runs.report.write_report", lambda directory: directory)


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)
