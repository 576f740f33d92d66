"""`elastic up` with both servers on a real PostgreSQL: the same pipeline, the same outcome."""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
from micro import Command, Run, write_micro
from served import Elastified, Served, assert_made, elastify
from served import served as serving

from tasks.running.loopback import free_ports

# Debian keeps the programs of each version out of PATH.
PLACES = os.pathsep.join([os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))])
INITDB, PG_CTL = (shutil.which(name, path=PLACES) for name in ("initdb", "pg_ctl"))

pytestmark = [
    pytest.mark.services,
    pytest.mark.slow,
    pytest.mark.skipif(INITDB is None or PG_CTL is None, reason="no PostgreSQL here; Debian's package is `postgresql`"),
]


@dataclass(frozen=True)
class Database:
    """A PostgreSQL of this test alone."""

    port: int
    password: str

    def url(self, name: str, driver: str = "postgresql") -> str:
        return f"{driver}://elastic:{self.password}@127.0.0.1:{self.port}/{name}"

    def query(self, name: str, statement: str) -> list[tuple[object, ...]]:
        with closing(psycopg2.connect(self.url(name))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []


@contextmanager
def postgresql() -> Iterator[Database]:
    """Run one with an empty database for each server; as root it is another user's, for PostgreSQL refuses root."""
    user = "postgres" if os.geteuid() == 0 else None
    database = Database(port=free_ports(1)[0], password=secrets.token_hex(16))
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to other users
        (password := Path(name, "password")).write_text(database.password)
        if user is not None:
            shutil.chown(name, user)
            shutil.chown(password, user)

        def do(*command: str | Path | None) -> None:
            subprocess.run([str(part) for part in command], user=user, cwd=name, check=True, stdout=subprocess.DEVNULL)

        data, options = Path(name, "data"), f"-p {database.port} -h 127.0.0.1 -k {name} -F"
        do(INITDB, "-D", data, "-U", "elastic", "-A", "scram-sha-256", "--pwfile", password)
        do(PG_CTL, "-D", data, "-l", Path(name, "log"), "-o", options, "-w", "start")
        try:
            for server in ("prefect", "mlflow"):
                database.query("postgres", f"CREATE DATABASE {server}")
            yield database
        finally:
            do(PG_CTL, "-D", data, "-m", "immediate", "-w", "stop")


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with postgresql() as database:
        yield database


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, database: Database) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("postgresql")
    command = Command(recipe=write_micro(directory), home=directory / "home")
    named = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.url("prefect", "postgresql+asyncpg"),
        "MLFLOW_BACKEND_STORE_URI": database.url("mlflow"),
    }
    with serving(command, extra=named) as up:
        yield up


@pytest.fixture(scope="module")
def elastified(served: Served) -> Elastified:
    return elastify(served)


def test_the_pipeline_ends_as_on_sqlite(served: Served, elastified: Elastified, finished: Run):
    assert served.run(elastified.killed).state.is_crashed()
    assert_made(served, elastified.run, finished)


def test_all_of_it_is_in_postgresql(served: Served, database: Database, elastified: Elastified):
    states = dict(database.query("prefect", "SELECT id::text, state_type::text FROM flow_run"))
    assert states[str(elastified.killed)] == "CRASHED" and states[str(elastified.run)] == "COMPLETED"
    versions = database.query("mlflow", "SELECT name, version FROM model_versions ORDER BY name")
    assert versions == [("micro-l", 1), ("micro-m", 1), ("micro-s", 1)]
    assert not list(served.home.rglob("*.db"))


def test_its_password_is_nowhere_in_the_state_directory(served: Served, database: Database, elastified: Elastified):
    secret = database.password.encode()
    assert not [path for path in served.home.rglob("*") if path.is_file() and secret in path.read_bytes()]
