"""Register, find and fetch drafts in MLflow. Knows digests and lineage; no engine, and nothing that was said in a request.

    experiment  tide/<target>        one run per draft: settings, curve, the draft's files
    model       <target>-draft       one version per draft digest; tags: digest, engine_digest, parent, workload, windows, rows, ...
    aliases     champion             follows what is served; challenger: what is before the gate or on its way (rollout/alias.py)
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tide_pipeline.config import TideConfig
from tide_pipeline.contracts import DraftCheckpoint
from tide_pipeline.errors import CheckpointError, RegistryError
from tide_pipeline.models.checkpoint import FILES, digest_draft
from tide_pipeline.registry.client import connect, talking, tolerating
from tide_pipeline.registry.run import ARTIFACTS, PROVENANCE, ensure_experiment, ensure_model, log_draft, read_provenance, single_value

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RegisteredDraft:
    """A version of `<target>-draft`."""

    version: int
    draft_version: str             # "v<version>-<digest8>"; "shipped-<digest8>" for the draft an engine came with
    digest: str
    run_id: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict, compare=False)
    created_at: float = field(default=0.0, compare=False)              # Unix seconds, by MLflow's clock


def default_uri(config: TideConfig) -> str:
    """TIDE_MLFLOW_URI, or a database in the state directory that needs no server."""
    found = os.environ.get("TIDE_MLFLOW_URI")
    if found:
        return found
    config.state.mlflow.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{config.state.mlflow / 'mlflow.db'}"


def open_registry(config: TideConfig) -> Registry:
    """The registry of the configured target."""
    return Registry(default_uri(config), config.target)


class Registry:
    """Drafts of one target. Every method raises RegistryError when MLflow is away or refuses."""

    def __init__(self, tracking_uri: str, target: str) -> None:
        self.uri, self.target, self.name = tracking_uri, target, f"{target}-draft"

    @functools.cached_property
    def client(self) -> MlflowClient:
        return connect(self.uri)

    def register(self, checkpoint: DraftCheckpoint, *, lineage: Mapping[str, Any], label: str = "") -> RegisteredDraft:
        """Log the checkpoint folder as a run and make it a version; a digest that is registered already gives that version.

        `lineage` becomes tags: workload, dagster_run_id and whatever else says where the draft comes from, single values only.
        `label` takes the place of "v<version>" in the draft version.

        Raises:
            CheckpointError: the folder is no draft.
            RegistryError: its bytes are not those of `checkpoint.digest`.
        """
        found = digest_draft(Path(checkpoint.path))
        if found != checkpoint.digest:
            raise RegistryError(f"draft {checkpoint.path} has digest {found[:12]}, its record says {checkpoint.digest[:12]}: "
                                "it was altered after training, train it again")
        tags = self._tags(checkpoint, lineage, label)
        client = self.client
        with self.talking(f"registered of draft {found[:8]}"):
            ensure_model(client, self.name, self.target)
            if (known := self._find(found)) is not None:
                return known
            run_id = log_draft(client, ensure_experiment(client, self.uri, self.target), checkpoint, tags)
            source = f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACTS}"
            mine = client.create_model_version(self.name, source, run_id, tags=tags)
            first = self._find(found) or self.read(mine)
            if first.version != int(mine.version):                     # somebody registered the same draft meanwhile
                client.delete_model_version(self.name, str(mine.version))
            else:
                client.set_model_version_tag(self.name, str(mine.version), "draft_version", first.draft_version)
            return first

    def find(self, digest: str) -> RegisteredDraft | None:
        """The version with this draft digest."""
        with self.talking("read"):
            return self._find(digest)

    def get(self, version: int) -> RegisteredDraft:
        with self.talking("read"):
            return self.read(self.client.get_model_version(self.name, str(int(version))))

    def list(self) -> Sequence[RegisteredDraft]:
        """All versions, oldest first."""
        with self.talking("read"):
            return self._search(f"name = '{self.name}'")

    def having(self, tag: str, value: str) -> Sequence[RegisteredDraft]:
        """Versions with this tag, oldest first."""
        with self.talking("read"):
            return self._search(f"name = '{self.name}' and tags.{tag} = '{value}'")

    def fetch(self, version: int, into: Path) -> Path:
        """Download a draft as folder `into`, whole or not at all; its bytes are checked against the recorded digest."""
        draft = self.get(version)
        if into.exists():
            with contextlib.suppress(CheckpointError):
                if digest_draft(into) == draft.digest:
                    return into
            raise RegistryError(f"{into} exists and is not {draft.draft_version}: remove it, or fetch into another folder")
        with self.talking(f"fetched of version {version}"):
            into.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{into.name}.", dir=into.parent) as scratch:
                got = Path(self.client.download_artifacts(draft.run_id, ARTIFACTS, scratch))
                self._verify(draft, got)
                shutil.move(got, into)
        return into

    def provenance(self, version: int) -> dict[str, Any]:
        """A version's birth certificate; {} for a draft that was registered without one."""
        draft, place = self.get(version), f"{ARTIFACTS}/{PROVENANCE}"
        with self.talking(f"fetched of version {version}"), tempfile.TemporaryDirectory() as scratch:
            if place not in {file.path for file in self.client.list_artifacts(draft.run_id, ARTIFACTS)}:
                return {}
            return read_provenance(Path(self.client.download_artifacts(draft.run_id, place, scratch)).parent)

    def aliases(self) -> Mapping[str, int]:
        """Every alias and the version it points at."""
        with self.talking("read"):
            return {name: int(version) for name, version in self._aliases().items()}

    def alias(self, name: str) -> int | None:
        """The version an alias points at."""
        with self.talking("read"):
            version = self._aliases().get(name)
            return None if version is None else int(version)

    def set_alias(self, name: str, version: int) -> None:
        with self.talking(f"changed of alias {name!r}"):
            self.client.set_registered_model_alias(self.name, name, str(version))

    def drop_alias(self, name: str) -> None:
        """Take an alias away; one that is not there is no error."""
        with self.talking(f"changed of alias {name!r}"), tolerating("RESOURCE_DOES_NOT_EXIST"):
            self.client.delete_registered_model_alias(self.name, name)

    def marks(self) -> Mapping[str, str]:
        """Tags of the model itself; {} before its first version."""
        with self.talking("read"), tolerating("RESOURCE_DOES_NOT_EXIST"):
            return dict(self.client.get_registered_model(self.name).tags)
        return {}

    def mark(self, key: str, value: str) -> None:
        """Add or replace a tag of the model itself."""
        with self.talking(f"marked of {self.name}"):
            self.client.set_registered_model_tag(self.name, key, single_value(key, value))

    def tag(self, version: int, tags: Mapping[str, Any]) -> None:
        """Add or replace tags of a version, such as a gate's verdict."""
        with self.talking(f"tagged of version {version}"):
            for key, value in tags.items():
                self.client.set_model_version_tag(self.name, str(version), key, single_value(key, value))

    @contextlib.contextmanager
    def talking(self, done: str) -> Iterator[None]:
        """Whatever goes wrong with MLflow inside is a RegistryError: nothing was `done`."""
        _ = self.client                                                # importing MLflow comes before its errors' names
        with talking(self.uri, done):
            yield

    # --- inside `talking` -------------------------------------------------------------------------------------------

    def _tags(self, checkpoint: DraftCheckpoint, lineage: Mapping[str, Any], label: str) -> dict[str, str]:
        facts = {"target": self.target, "digest": checkpoint.digest, "engine_digest": checkpoint.engine_digest, "parent": checkpoint.parent,
                 "windows": checkpoint.num_windows, "rows": checkpoint.num_rows, "label": label,
                 "acceptance_length": round(checkpoint.acceptance_length, 4), **lineage}
        return {key: single_value(key, value) for key, value in facts.items() if value not in (None, "")}

    def _aliases(self) -> Mapping[str, Any]:
        with tolerating("RESOURCE_DOES_NOT_EXIST"):
            aliases: Mapping[str, Any] = self.client.get_registered_model(self.name).aliases
            return aliases
        return {}

    def _find(self, digest: str) -> RegisteredDraft | None:
        found = self._search(f"name = '{self.name}' and tags.digest = '{digest}'")
        return found[0] if found else None

    def _search(self, query: str) -> Sequence[RegisteredDraft]:
        return sorted((self.read(version) for version in self.versions(query)), key=lambda draft: draft.version)

    def versions(self, query: str) -> Iterator[ModelVersion]:
        """As MLflow has them, whoever made them."""
        token = None
        while True:
            page = self.client.search_model_versions(query, max_results=200, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    @staticmethod
    def is_ours(found: ModelVersion) -> bool:
        """Whether `tide register` made it: nobody else says what its bytes are."""
        return DIGEST.fullmatch(found.tags.get("digest", "")) is not None

    def read(self, found: ModelVersion) -> RegisteredDraft:
        """MLflow's version as ours. Raises RegistryError for one that has no digest."""
        tags, version = dict(found.tags), int(found.version)
        digest = tags.get("digest", "")
        if not self.is_ours(found):
            raise RegistryError(f"{self.name} version {version} has no digest tag: it was not made by `tide register`, "
                                "register the draft again")
        label = tags.get("label", "")                      # anybody's to write, and part of a path
        name = label if LABEL.fullmatch(label) else f"v{version}"
        return RegisteredDraft(version, f"{name}-{digest[:8]}", digest, found.run_id, self.name, tags, found.creation_timestamp / 1e3)

    def _verify(self, draft: RegisteredDraft, folder: Path) -> None:
        try:
            found = digest_draft(folder)
        except CheckpointError as error:
            raise RegistryError(f"{draft.draft_version} in MLflow lacks {' or '.join(FILES)}: register it again") from error
        if found != draft.digest:
            raise RegistryError(f"MLflow gave other bytes for {draft.draft_version}: digest {found[:12]}, recorded {draft.digest[:12]}. "
                                "The artifact store was altered: don't serve it, register the draft again from its checkpoint")
