"""Facts about the machine a result was measured on, and bootstrap intervals. Names no host and no path."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def facts() -> dict[str, Any]:
    """Goes into every result file."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def median_interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median with its bootstrap 95 % interval."""
    data = np.asarray(values, dtype=float)
    medians = np.median(np.random.default_rng(seed).choice(data, (2000, len(data))), axis=1)
    return {"median": round(float(np.median(data)), 4), "low": round(float(np.quantile(medians, 0.025)), 4),
            "high": round(float(np.quantile(medians, 0.975)), 4), "n": len(data)}
