"""A PostgreSQL of our own for the tests that need one: Debian's package, started on a free port in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path

import pytest


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """URL of an empty database."""
    binaries = _binaries()
    if binaries is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no PostgreSQL; .ci/run installs it")
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = Path(f"/tmp/hydratune-pg-{os.getpid()}")
    folder.mkdir()
    root = os.getuid() == 0  # which it refuses to run as
    owner = pwd.getpwnam("postgres") if root else pwd.getpwuid(os.getuid())
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def pg(*command: str) -> None:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            user=owner.pw_uid if root else None,
            group=owner.pw_gid if root else None,
            cwd=folder,
        )

    data, options = str(folder / "data"), f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        pg(str(binaries / "initdb"), "-D", data, "-U", "tester", "-A", "trust")
        pg(str(binaries / "pg_ctl"), "-D", data, "-o", options, "-w", "-l", str(folder / "log"), "start")
        try:
            pg(str(binaries / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "tester", "studies")
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}/studies"
        finally:
            pg(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
