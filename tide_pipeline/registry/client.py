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

NO_ANSWER = "failed with exception"                    # of a request, as MLflow's client words it

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
        raise _kind_of(error)(f"MLflow at {where} refused, nothing was {done}: {_first_line(error)}") from error
    except (MlflowException, requests.RequestException, SQLAlchemyError, OSError) as error:
        raise _kind_of(error)(f"MLflow at {where} can't be used, nothing was {done}: {_first_line(error)}. Start it with `tide up` or set "
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


def _kind_of(error: Exception) -> type[RegistryError]:
    """Whether later may do: no answer, a database in use, a server's own trouble. An artifact that is gone stays gone."""
    import requests
    from mlflow.exceptions import MlflowException, RestException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, RestException):
        is_away = error.get_http_status_code() >= 500
    elif isinstance(error, requests.HTTPError):
        is_away = error.response is None or error.response.status_code >= 500
    elif isinstance(error, MlflowException):
        is_away = error.error_code == "TEMPORARILY_UNAVAILABLE" or NO_ANSWER in str(error)
    else:
        is_away = isinstance(error, requests.RequestException | OperationalError | ConnectionError | TimeoutError)
    return RegistryAway if is_away else RegistryError


def _first_line(error: Exception) -> str:
    text = without_password(str(error)).strip() or type(error).__name__
    return "no answer" if "Max retries exceeded" in text else text.splitlines()[0][:300]
