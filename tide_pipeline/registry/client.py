"""The line to MLflow: quiet, quick to give up, every failure a RegistryError that names the server. Knows no drafts."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tide_pipeline.errors import RegistryAway, RegistryError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# MLflow reads these when it is imported or asked; the user's own settings win.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",               # seconds to connect, and between two pieces of an answer
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0.2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def load_mlflow() -> type[MlflowClient]:
    """Importing it takes seconds: whoever can, does it before it is needed."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    made: type[MlflowClient] = MlflowClient
    return made


def connect(uri: str) -> MlflowClient:
    """A client. Nothing is sent yet for an HTTP server."""
    made = load_mlflow()
    with talking(uri, "opened"):
        return made(tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def talking(uri: str, done: str) -> Iterator[None]:
    """Everything MLflow, its database or the network raises becomes a RegistryError: "`done` could not be ..."."""
    import requests
    from mlflow.exceptions import MlflowException, RestException
    from sqlalchemy.exc import SQLAlchemyError

    where = without_password(uri)
    try:
        yield
    except RestException as error:
        kind = RegistryAway if error.get_http_status_code() >= 500 else RegistryError      # of its own: a full disk, a database in use
        raise kind(f"MLflow at {where} refused, nothing was {done}: {_first_line(error)}") from error
    except (MlflowException, requests.RequestException, SQLAlchemyError, OSError) as error:
        raise RegistryAway(f"MLflow at {where} can't be used, nothing was {done}: {_first_line(error)}. Start it with `tide up` or set "
                            "TIDE_MLFLOW_URI to a server that answers, then run the same command again") from error


@contextlib.contextmanager
def tolerating(code: str) -> Iterator[None]:
    """Passes over MLflow's answer `code`, such as RESOURCE_ALREADY_EXISTS."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != code:
            raise


def without_password(uri: str) -> str:
    """The address as it may be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _first_line(error: Exception) -> str:
    text = without_password(str(error)).strip() or type(error).__name__
    return "no answer" if "Max retries exceeded" in text else text.splitlines()[0][:300]
