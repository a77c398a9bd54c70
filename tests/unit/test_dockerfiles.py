"""The Dockerfiles: hadolint, what they copy, and that the serving image keeps NVIDIA's torch."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.test_architecture import BARE, _all_imports
from tide_pipeline.config import project_root

FILES = ("Dockerfile", "docker/serve.Dockerfile")


def instructions(name: str) -> list[str]:
    """One line each, comments gone."""
    text = re.sub(r"(?m)^#.*\n", "", (project_root() / name).read_text())
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def missing() -> types.ModuleType:
    """docker/missing.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("missing", project_root() / "docker" / "missing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(program), "--no-color", str(project_root() / name)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && pip install torch\n")
    done = subprocess.run([str(Path(sys.executable).with_name("hadolint")), str(tmp_path / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 1 and "DL3006" in done.stdout


@pytest.mark.parametrize("name", FILES)
def test_images_run_as_our_user_and_take_secrets_from_files(name: str) -> None:
    lines = instructions(name)
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 10001"] and any("useradd --uid 10001" in line for line in lines)
    assert 'ENTRYPOINT ["sh", "/app/docker/with-secrets.sh"]' in lines
    assert all(re.search(r":[\w.-]*\d", line) for line in lines if line.startswith("FROM")), "base images are pinned"


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    copied = [word for line in instructions(name) if line.startswith("COPY") and "--from" not in line
              for word in line.split()[1:-1] if not word.startswith("--")]
    assert "tide_pipeline" in copied and "engines" in copied
    assert all((project_root() / word).exists() for word in copied)
    assert not set(copied) & set((project_root() / ".dockerignore").read_text().split())


def test_packages_come_before_our_files() -> None:
    """A change of our code leaves the layers of packages alone."""
    lines = instructions("Dockerfile")
    installs = [i for i, line in enumerate(lines) if "pip install" in line]
    ours = next(i for i, line in enumerate(lines) if line == "COPY tide_pipeline tide_pipeline")
    assert installs and max(installs) < ours
    assert all("--constraint requirements.lock" in lines[i] and "--mount=type=cache" in lines[i] for i in installs)


# --- the serving image keeps the container's torch ----------------------------------------------------------------

def test_the_serving_image_installs_through_missing_py_alone() -> None:
    text = "\n".join(instructions("docker/serve.Dockerfile"))
    assert not re.search(r"\bpip\b", text) and "missing.py" in text and "PYTHONPATH=/app" in text


def test_serving_needs_no_more_than_the_list(missing: types.ModuleType) -> None:
    """torch apart, what the bare rooms import is what the list names."""
    listed = {name for name, _, _ in missing.wanted((project_root() / "docker" / "serve.txt").read_text())}
    imported = {name.split(".")[0] for module, name in _all_imports() if module.split(".")[0] in BARE}
    theirs = {"torch", "triton_python_backend_utils", "tensorrt_llm", "ray"}
    others = {name for name in imported if name not in sys.stdlib_module_names} - {"tide_pipeline", *theirs}
    assert others <= listed, "name it in docker/serve.txt"
    locked = dict(line.split("==") for line in (project_root() / "requirements.lock").read_text().splitlines())
    assert all(locked[name] == version for name, _, version in missing.wanted((project_root() / "docker" / "serve.txt").read_text()))


def test_only_what_is_not_there_is_installed(missing: types.ModuleType) -> None:
    text = "# why\nnumpy>=1.26==1.26.4\npyarrow>=20==25.0.1\ntokenizers>=0.21==0.23.3\n"
    assert missing.missing(text, {"numpy": "1.26.4", "tokenizers": "0.22.1"}.get) == ["pyarrow==25.0.1"]
    assert missing.missing(text, {"numpy": "1.26.4", "tokenizers": "0.9", "pyarrow": "20.0.0"}.get) == ["tokenizers==0.23.3"]
    assert missing.number("2.10.0a0+b4e4ee8.nv25.12") == (2, 10, 0)


@pytest.mark.parametrize(("text", "have", "said"), [
    ("numpy>=1.26==1.26.4", {"numpy": "1.24.0"}, "numpy is never replaced"),
    ("torch>=2.10==2.13.0", {"torch": "2.10.0"}, "may not be named here"),
    ("tensorrt-llm>=1.2==1.2.1", {}, "may not be named here"),
    ("pyarrow", {}, "expected NAME"),
])
def test_nothing_of_nvidia_is_replaced(missing: types.ModuleType, text: str, have: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        missing.missing(text, have.get)
