"""What every benchmark script takes and writes: --quick, --json, --engine-dir, machine facts. Knows no engine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from machine import facts

from tide_pipeline.config import project_root


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--engine-dir", type=Path, default=project_root() / "engines" / "pocket", help="folder with engine.toml")
    made.add_argument("--quick", action="store_true", help="a few seconds that show only that it runs; the figures mean nothing")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    return made


def settle() -> dict[str, Any]:
    """One thread, and OpenMP told so before torch starts (by starting again); returns the head of the result."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | {"OMP_WAIT_POLICY": "passive"})
    torch.set_num_threads(1)
    return {"machine": facts() | {"omp_wait_policy": os.environ["OMP_WAIT_POLICY"]}}


def finish(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the result and, if asked to, write it."""
    result["quick"] = args.quick
    result["machine"]["load_1m_after"] = round(os.getloadavg()[0], 2)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
