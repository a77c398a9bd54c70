"""What must be there before the parts of a stack start beside each other. Each step may run again; starts nothing that stays.

    python -m tide_pipeline.stack.prepare serving [--bucket NAME ...]    buckets, the first deployment
    python -m tide_pipeline.stack.prepare pipeline                       Dagster's storage, the shipped draft in MLflow

`tide up` takes the same steps between its starts; docker-compose.yml runs this in a container that ends. Settings: TIDE_CONFIG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tide_pipeline import recipes
from tide_pipeline.config import TideConfig
from tide_pipeline.errors import StackError, TideError


def serving(config: TideConfig, buckets: Sequence[str]) -> list[str]:
    """What a replica needs: where it captures to, and a deployment to serve. Returns what was done, in words."""
    from tide_pipeline.rollout.initial import ensure_initial  # imports torch

    done = [f"bucket {name}: {'made' if make_bucket(name) else 'there'}" for name in buckets]
    config.state.root.mkdir(parents=True, exist_ok=True)
    deployment = ensure_initial(config)
    return [*done, f"deployment {deployment.n}: {deployment.reason}" if deployment else "the engine ships no draft: serving without one"]


def pipeline(config: TideConfig) -> list[str]:
    """What Dagster and the first adaptation need. Raises TideError."""
    from tide_pipeline.registry.shipped import register_shipped

    for folder in (config.state.dagster, config.state.dagster / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    storage = make_dagster_storage()
    draft = register_shipped(config)
    return [f"Dagster's storage: {storage}", f"registered draft: {draft.draft_version}" if draft else "no shipped draft to register"]


def make_dagster_storage() -> str:
    """All tables, before several processes would create them at once. Returns the kind of storage."""
    from dagster import DagsterInstance

    instance = DagsterInstance.get()
    try:
        instance.get_runs(limit=1)
        instance.all_instigator_state()
        instance.event_log_storage.get_maximum_record_id()
        return type(instance.run_storage).__name__
    finally:
        instance.dispose()


def make_bucket(name: str) -> bool:
    """False when it is there already. Address and keys: AWS_*, as everywhere. Raises StackError."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise StackError("buckets need boto3: pip install 'tide-pipeline[production]'") from error
    client = boto3.client("s3")
    try:
        if name in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            return False
        client.create_bucket(Bucket=name)
    except (BotoCoreError, ClientError) as error:
        raise StackError(f"bucket {name} could not be made: {error}. Check AWS_ENDPOINT_URL_S3 and the two keys") from error
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tide_pipeline.stack.prepare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("serving", "pipeline"))
    parser.add_argument("--bucket", action="append", default=[], help="an S3 bucket to make where there is none; repeatable")
    args = parser.parse_args()
    try:
        config = recipes.from_environment()
        done = serving(config, args.bucket) if args.what == "serving" else pipeline(config)
    except TideError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{line}\n" for line in done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
