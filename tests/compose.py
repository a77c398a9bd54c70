"""docker-compose.yml as tests read it, and our rules for what the Compose schema can't say. Knows the file; runs nothing.

`lint` returns sentences, one for each rule that is broken; tests feed it altered copies to see that each rule can break.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tide_pipeline.config import project_root

Compose = dict[str, Any]
OURS = ("tide-pipeline:cpu", "tide-pipeline:train", "tide-pipeline:serve")      # built here from the Dockerfiles
PINNED = re.compile(r"[a-z0-9./-]+:(v?\d+\.\d+(\.\d+)?(-[a-z0-9.-]+)?|RELEASE\.[0-9TZ-]+)")
CONDITIONS = ("service_healthy", "service_completed_successfully")
VARIABLE = re.compile(r"\$\{(\w+)(:-([^}]*))?\}")


def load() -> Compose:
    found: Compose = yaml.safe_load((project_root() / "docker-compose.yml").read_text())
    return found


def altered(compose: Compose, path: str, value: Any) -> Compose:
    """A copy with one value replaced, such as "services.front.ports"; None removes it."""
    out = copy.deepcopy(compose)
    *above, last = path.split(".")
    place = out
    for name in above:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return out


def is_one_shot(service: dict[str, Any]) -> bool:
    return bool(service.get("restart") == "no")


def profiles(compose: Compose) -> set[str]:
    return {profile for service in compose["services"].values() for profile in service["profiles"]}


def interpolated(text: str, values: dict[str, str] | None = None) -> str:
    """${NAME:-default} as Compose reads it."""
    return VARIABLE.sub(lambda match: (values or {}).get(match[1], "") or match[3] or "", text)


def texts(value: Any) -> Iterator[str]:
    """Every string inside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for part in value.items() for text in texts(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in texts(part))


def lint(compose: Compose) -> list[str]:
    """What is wrong, in words; [] for a file that keeps all rules."""
    out = []
    for name, service in compose["services"].items():
        out += [f"{name}: {text}" for text in (*_image(service), *_reach(service), *_care(service), *_secrets(compose, service))]
        out += [f"{name}: {text}" for text in _order(compose, service)]
    used = {text for service in compose["services"].values() for text in service.get("secrets", [])}
    out += [f"secret {name} is used by nobody" for name in compose["secrets"].keys() - used]
    out += [f"volume {name} is used by nobody" for name in compose["volumes"].keys() - set(_volumes(compose["services"].values()))]
    out += [f"{match[0]} has no default, and Compose asks for it in every profile" for text in texts(compose)
            for match in VARIABLE.finditer(text) if not match[3]]
    return out


def _image(service: dict[str, Any]) -> Iterator[str]:
    image = service.get("image", "")
    if image in OURS:
        if "build" not in service:
            yield f"{image} is ours and has no build"
    elif not PINNED.fullmatch(image):
        yield f"image {image!r} is not pinned to a release"


def _reach(service: dict[str, Any]) -> Iterator[str]:
    for port in service.get("ports", []):
        if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", str(port)):
            yield f"port {port} is not published on 127.0.0.1 alone"
    if service.get("ports") and "edge" not in service["networks"]:
        yield "publishes a port, and is not on the network `edge`"
    if not service.get("ports") and "edge" in service["networks"]:
        yield "is on the network `edge`, and publishes nothing"
    for key in ("privileged", "network_mode", "pid", "ipc", "cap_add"):
        if key in service:
            yield f"{key} opens the host to it"
    if any("docker.sock" in text for text in texts(service.get("volumes", []))):
        yield "has Docker's socket, which is root on the host"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "may gain privileges: security_opt no-new-privileges:true"


def _care(service: dict[str, Any]) -> Iterator[str]:
    if not service.get("profiles"):
        yield "has no profile, so it starts with every one"
    if service.get("restart") not in ("unless-stopped", "no"):
        yield "has no restart policy"
    if is_one_shot(service):
        return
    if not {"test", "interval", "timeout", "start_period"} <= service.get("healthcheck", {}).keys():
        yield "has no whole health check"
    elif service["healthcheck"]["test"][0] != "CMD":
        yield "its health check is no plain list of words"
    if "memory" not in service.get("deploy", {}).get("resources", {}).get("limits", {}):
        yield "has no memory limit"


def _secrets(compose: Compose, service: dict[str, Any]) -> Iterator[str]:
    named = [Path(text).name for text in texts(service.get("environment", {})) if text.startswith("/run/secrets/")]
    given = service.get("secrets", [])
    yield from (f"reads the secret {name} and is not given it" for name in named if name not in given)
    yield from (f"secret {name} is not declared" for name in given if name not in compose["secrets"])
    for key, value in service.get("environment", {}).items():
        if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|ROOT_USER", key) and not str(value).startswith("/run/secrets/"):
            yield f"{key} holds a secret in the file: name a file under /run/secrets"
        if re.search(r"//[^/@]*:[^/@]*@", str(value)):
            yield f"{key} has a password in its address"


def _order(compose: Compose, service: dict[str, Any]) -> Iterator[str]:
    depends = service.get("depends_on", {})
    if not isinstance(depends, dict):
        yield "depends_on says no condition"
        return
    for other, how in depends.items():
        there = compose["services"].get(other)
        if there is None:
            yield f"depends on {other}, which is not there"
            continue
        wanted = CONDITIONS[1] if is_one_shot(there) else CONDITIONS[0]
        if how.get("condition") != wanted:
            yield f"waits for {other} with {how.get('condition')}, not {wanted}"
        if missing := set(service["profiles"]) - set(there["profiles"]):
            yield f"is in the profile {', '.join(sorted(missing))}, and {other} is not"


def _volumes(services: Iterable[dict[str, Any]]) -> Iterator[str]:
    for service in services:
        yield from (text.split(":")[0] for text in service.get("volumes", []))
