"""Rendered by tide_pipeline.serve.repository: edit that instead."""

import os
import sys

# Triton's stub runs an isolated interpreter, which does not read PYTHONPATH by itself.
sys.path.extend(place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place not in sys.path)

from tide_pipeline.serve.orphan import watch_parent  # noqa: E402

watch_parent()

from tide_pipeline.serve.model import TritonPythonModel  # noqa: E402, F401
