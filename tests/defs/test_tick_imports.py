"""What a tick of the drift sensor loads: a code server that has just started answers its first tick without torch, which takes seconds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.fakes_capture import SLOW, FakeEngine
from tests.fakes_drift import acceptance_row, config_in, write_log
from tide_pipeline import recipes
from tide_pipeline.capture.recorder import Recorder
from tide_pipeline.config import TideConfig, override

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "mlflow")
TICK = f"""
import sys
import dagster as dg
from tide_pipeline.defs.drift_sensor import drift_sensor
from tide_pipeline.defs.resources import TideResource
with dg.DagsterInstance.local_temp(sys.argv[2]) as instance:
    result = drift_sensor(dg.build_sensor_context(instance=instance, resources={{"tide": TideResource(config_file=sys.argv[1])}}))
print([[name for name in {HEAVY!r} if name in sys.modules], len(result.asset_events), len(result.run_requests or []),
       result.skip_reason.skip_message if result.skip_reason else ""])
"""


def _drifted_lake(folder: Path) -> TideConfig:
    """Acceptance fell 8 s ago; some signals of it are captured."""
    config = override(config_in(folder, linger_s=0.0, min_signal_rows=100_000), {"stack": {"sensor_interval_s": 0}})
    now = time.time()
    for since, accepted in ((now - 200.0, 24), (now - 8.0, 6)):
        write_log(config, [acceptance_row(since + 0.05 * i, request_id=f"{since}-{i}", workload="code", accepted=(accepted, 3, 1))
                           for i in range(40)])
    recorder = Recorder(SLOW, config.target, config.state.lake, "replica-0")
    engine = FakeEngine(recorder)
    for i in range(4):
        engine.run(f"code-{i}", workload="code")
    recorder.close()
    return config


def test_the_first_tick_of_a_process_loads_no_torch(tmp_path: Path) -> None:
    """With all that a tick can do but launch: judge, count signals in an open episode, ask what holds a draft back, observe."""
    config, settings, home = _drifted_lake(tmp_path), tmp_path / "settings.toml", tmp_path / "dagster"
    recipes.freeze(config, settings)
    home.mkdir()
    done = subprocess.run([sys.executable, "-c", TICK, str(settings), str(home)], capture_output=True, text=True, timeout=120, check=False,
                          cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2_000:]
    loaded, observed, asked, says = ast.literal_eval(done.stdout.splitlines()[-1])
    assert loaded == []
    assert (observed, asked) == (2, 0)
    assert "drifted, but only " in says and " signal rows collected yet" in says and " 0 of" not in says
