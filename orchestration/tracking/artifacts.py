"""Puts files where MLflow keeps those of its runs; writes only what is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestration.errors import SweepError, without_password
from orchestration.tracking.run_files import RunFile

if TYPE_CHECKING:
    from orchestration.tracking.experiment import Client

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ArtifactsUnavailable(Exception):  # noqa: N818
    """The place for files refuses, or gives no answer; what was put there before stays."""


class Artifacts:
    """The files of an experiment's runs, as far as they were looked at or put there.

    Args:
        uri: of MLflow.
        writer: the client to write with; may raise, which ends whatever is under way.
    """

    def __init__(self, uri: str, client: Client, writer: Callable[[], Client]) -> None:
        self._uri, self._reader, self._writer = uri, client, writer
        self._held: dict[str, dict[str, str]] = {}
        self.added = 0
        """Files that were written."""

    def begin(self, run_id: str) -> None:
        """The run has just been created: it holds nothing."""
        self._held[run_id] = {}

    def put(self, run_id: str, place: str, files: Sequence[RunFile], *, complete: bool, look: bool = False) -> None:
        """Write the files that the run lacks.

        Args:
            place: where MLflow says that the run's files lie.
            complete: all of them were there once, such as they are now.
            look: at the place itself, instead of trusting what is remembered.

        Raises:
            Unstored: the place cannot be written to.
            SweepError: what a file is made of cannot be read; all others are there.
        """
        _require_reachable(self._uri, place)
        if look or run_id not in self._held:
            self._held[run_id] = self._found(run_id, files, complete=complete)
        faults: list[SweepError] = []
        for file in self._lacking(run_id, files):
            try:
                body = file.make()
            except SweepError as error:
                faults.append(error)
                continue
            self._write(run_id, file, body)
        if faults:
            raise faults[0]

    def lacking(self, run_id: str, files: Sequence[RunFile]) -> int:
        """How many of the files the run is not known to hold."""
        return len(self._lacking(run_id, files))

    def _lacking(self, run_id: str, files: Sequence[RunFile]) -> list[RunFile]:
        held = self._held.get(run_id, {})
        return [file for file in files if held.get(file.name) != file.made_of]

    def _found(self, run_id: str, files: Sequence[RunFile], *, complete: bool) -> dict[str, str]:
        """Of what lies there, only what never changes is trusted to be what it shall be, unless all was complete."""
        with _told():
            names = set(self._listed(run_id, {str(PurePosixPath(file.name).parent) for file in files}))
        return {file.name: file.made_of for file in files if file.name in names and (complete or file.fixed)}

    def _listed(self, run_id: str, folders: Iterable[str]) -> Iterator[str]:
        for folder in sorted(folders):
            yield from (info.path for info in self._reader.list_artifacts(run_id, None if folder == "." else folder))

    def _write(self, run_id: str, file: RunFile, body: bytes) -> None:
        writer, name = self._writer(), PurePosixPath(file.name)
        with _told(), TemporaryDirectory() as folder:
            path = Path(folder, name.name)
            path.write_bytes(body)
            writer.log_artifact(run_id, str(path), None if len(name.parts) == 1 else str(name.parent))
        self._held[run_id][file.name] = file.made_of
        self.added += 1


@contextmanager
def _told() -> Iterator[None]:
    """Whatever goes wrong as Unstored: a place may be a folder, a server or any cloud's store, each with its own errors."""
    try:
        yield
    except Exception as error:
        text = without_password(" ".join(str(error).split()))[:300]
        raise ArtifactsUnavailable(f"{type(error).__name__}: {text}") from error


def _require_reachable(uri: str, place: str) -> None:
    """MLflow's client writes to any local path that a server names, but on this machine, which may not be the server's."""
    local = urlsplit(place).scheme in ("", "file")
    host = urlsplit(uri).hostname if uri.startswith("http") else None
    if local and host and host not in _LOOPBACK:
        raise ArtifactsUnavailable(f"MLflow at {host} keeps files in its own folder {place}; start it with --serve-artifacts")
