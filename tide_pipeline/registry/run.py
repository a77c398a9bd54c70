"""One draft as one MLflow run: parameters, curve, files. Retry-safe: an unfinished run of the same digest is taken up again.

Only the draft's own files and numbers go up: a checkpoint folder may hold references to captured windows (run.json), and
those stay where they are.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tide_pipeline.contracts import DraftCheckpoint
from tide_pipeline.errors import RegistryError
from tide_pipeline.models.checkpoint import FILES
from tide_pipeline.registry.client import tolerating
from tide_pipeline.registry.curve import Point, draw_curve, read_curve

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

ARTIFACTS = "draft"                # folder of the run's artifacts that is the checkpoint
PROVENANCE = "provenance.json"
EXPIRED = "tide.expired"           # tag of a run whose draft's bytes were let go (expiry.py): it is never taken up again
BATCH = 900                        # metrics in one call; MLflow takes 1,000
SUMMARY = ("start_acceptance_length", "replay_acceptance_length", "best_step")


def ensure_model(client: MlflowClient, name: str, target: str) -> None:
    with tolerating("RESOURCE_ALREADY_EXISTS"):
        client.create_registered_model(name, {"target": target},
                                       f"EAGLE-3 drafts of {target}: trained by tide_pipeline, one version per digest")


def ensure_experiment(client: MlflowClient, uri: str, target: str) -> str:
    """Id of `tide/<target>`. Its artifacts lie beside a bare database; a server decides for itself."""
    name, beside = f"tide/{target}", None
    if uri.startswith("sqlite:///"):
        beside = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "artifacts" / target).as_uri()
    if client.get_experiment_by_name(name) is None:
        with tolerating("RESOURCE_ALREADY_EXISTS"):
            client.create_experiment(name, artifact_location=beside)
    return str(client.get_experiment_by_name(name).experiment_id)


def log_draft(client: MlflowClient, experiment_id: str, checkpoint: DraftCheckpoint, tags: Mapping[str, str]) -> str:
    """Id of the finished run that holds the checkpoint."""
    found = client.search_runs([experiment_id], f"tags.digest = '{checkpoint.digest}'", max_results=100)
    begun = [run for run in found if EXPIRED not in run.data.tags]
    run = begun[0] if begun else client.create_run(experiment_id, tags=dict(tags), run_name=_run_name(checkpoint, tags))
    run_id, folder = str(run.info.run_id), Path(checkpoint.path)
    try:
        provenance = read_provenance(folder)
        _log_numbers(client, run_id, checkpoint, provenance, read_curve(folder))
        _log_files(client, run_id, folder)
    except BaseException:
        with contextlib.suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return run_id


def single_value(key: str, value: Any) -> str:
    """Tags are single short values: lists, or texts of any length, could carry what was said in a request."""
    if not isinstance(value, str | int | float | bool):
        raise RegistryError(f"tag {key!r} must be a single value, got {type(value).__name__}")
    return str(value)[:500]


def _run_name(checkpoint: DraftCheckpoint, tags: Mapping[str, str]) -> str:
    return f"{tags.get('workload') or tags.get('label') or 'draft'}-{checkpoint.digest[:8]}"


def _log_numbers(client: MlflowClient, run_id: str, checkpoint: DraftCheckpoint, provenance: Mapping[str, Any],
                 curve: Sequence[Point]) -> None:
    from mlflow.entities import Metric, Param

    settings = provenance.get("settings")
    params = {**(settings if isinstance(settings, dict) else {}), "steps": checkpoint.steps, "parent": checkpoint.parent}
    client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in params.items()])
    began_ms = int((time.time() - checkpoint.train_s) * 1e3)
    metrics = [Metric(name, value, began_ms + int(point.get("elapsed_s", 0.0) * 1e3), int(point.get("step", 0)))
               for point in curve for name, value in point.items() if name != "step"]
    summary = {"best_acceptance_length": checkpoint.acceptance_length, "train_s": checkpoint.train_s, "windows": checkpoint.num_windows,
               "rows": checkpoint.num_rows, **{name: provenance[name] for name in SUMMARY if isinstance(provenance.get(name), int | float)}}
    metrics += [Metric(name, float(value), began_ms + int(checkpoint.train_s * 1e3), checkpoint.steps) for name, value in summary.items()]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _log_files(client: MlflowClient, run_id: str, folder: Path) -> None:
    for name in (*FILES, PROVENANCE):
        if (folder / name).is_file():
            client.log_artifact(run_id, str(folder / name), ARTIFACTS)
    curve = read_curve(folder)
    if curve:
        client.log_artifact(run_id, str(folder / "metrics.jsonl"))
        client.log_text(run_id, draw_curve(curve), "curve.svg")


def read_provenance(folder: Path) -> dict[str, Any]:
    """The birth certificate in a draft's folder; {} where there is none. Raises RegistryError when it is damaged."""
    try:
        found: dict[str, Any] = json.loads((folder / PROVENANCE).read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise RegistryError(f"{folder / PROVENANCE} is damaged ({error}): train the draft again") from error
    return found
