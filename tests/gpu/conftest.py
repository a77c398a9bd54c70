"""The GPU that these tests want. Run them with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip(f"needs a GPU: torch {torch.__version__} sees none")
    return torch.device("cuda", 0)
