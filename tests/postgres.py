"""A real PostgreSQL on loopback for tests, from the server programs that are installed. Ends with the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tide_pipeline.serve.process import die_with_parent


@dataclass(frozen=True)
class Server:
    """Superuser `postgres`; passwords are asked for over TCP, not on the socket, as in the container."""

    port: int
    folder: Path                   # of the socket
    password: str

    def psql(self, sql: str, *, user: str = "postgres", database: str = "postgres", password: str | None = None) -> str:
        """The answer as text, over TCP. Raises CalledProcessError."""
        command = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", user, "-d", database, "-XAtqc", sql]
        return subprocess.run(command, env={**os.environ, "PGPASSWORD": password or self.password}, capture_output=True, text=True,
                              check=True, timeout=60).stdout.strip()


def programs() -> Path | None:
    """The folder with initdb and postgres; None where no server is installed."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    return next((folder for folder in found if (folder / "postgres").is_file()), None)


@contextlib.contextmanager
def server(password: str) -> Iterator[Server]:
    """It refuses to run as root, so root gives it to `nobody`."""
    bin_dir = programs()
    assert bin_dir is not None, "ask programs() first"
    folder = Path(tempfile.mkdtemp(prefix="tide-pg-"))
    user = "nobody" if os.geteuid() == 0 else None
    (folder / "password").write_text(password)
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process: subprocess.Popen[bytes] | None = None
    try:
        subprocess.run([str(bin_dir / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "--no-sync", "--auth-local=trust",
                        "--auth-host=scram-sha-256", f"--pwfile={folder / 'password'}"], user=user, cwd=folder, check=True,
                       capture_output=True, timeout=300)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([str(bin_dir / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port), "-k",
                                        str(folder), "-c", "fsync=off"], user=user, cwd=folder, stderr=log, preexec_fn=die_with_parent)
        gives_up = time.monotonic() + 300
        while subprocess.run([str(bin_dir / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode:
            assert process.poll() is None and time.monotonic() < gives_up, (folder / "log").read_text()
            time.sleep(0.1)
        yield Server(port, folder, password)
    finally:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)                 # "fast": clients are cut off
            process.wait(60)
        shutil.rmtree(folder)
