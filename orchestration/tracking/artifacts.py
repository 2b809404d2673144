"""Uploads the files of MLflow's runs; writes only what is not there yet."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestration.errors import SweepError
from orchestration.tracking.mlflow_private import error_text
from orchestration.tracking.run_files import RunFile

if TYPE_CHECKING:
    from orchestration.tracking.experiment import Client

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ArtifactsUnavailable(Exception):  # noqa: N818
    """The artifact store refuses, or does not answer; files that were uploaded before stay."""


class Artifacts:
    """The files of an experiment's runs, as far as they were listed or uploaded.

    Args:
        uri: of MLflow.
        client: to read with.
        writer: returns the client to write with; may raise, which ends the upload.
    """

    def __init__(self, uri: str, client: Client, writer: Callable[[], Client]) -> None:
        self._uri, self._reader, self._writer = uri, client, writer
        self._known: dict[str, dict[str, str]] = {}
        """Run -> file name -> `made_of`."""
        self.added = 0
        """Files that were uploaded."""

    def begin(self, run_id: str) -> None:
        """Note that the run has just been created and has no files."""
        self._known[run_id] = {}

    def put(self, run_id: str, place: str, files: Sequence[RunFile], *, complete: bool, relist: bool = False) -> None:
        """Upload the files that the run lacks.

        Args:
            place: the run's artifact URI.
            complete: all of them were uploaded once, with their present content.
            relist: list the artifact store again, instead of trusting what is remembered.

        Raises:
            ArtifactsUnavailable: the artifact store cannot be used.
            SweepError: the store has not what a file is made of; all other files were uploaded.
        """
        _require_reachable(self._uri, place)
        if relist or run_id not in self._known:
            self._known[run_id] = self._list(run_id, files, complete=complete)
        errors: list[SweepError] = []
        for file in self._missing(run_id, files):
            try:
                body = file.make()
            except SweepError as error:
                errors.append(error)
                continue
            self._upload(run_id, file, body)
        if errors:
            raise errors[0]

    def missing(self, run_id: str, files: Sequence[RunFile]) -> int:
        """How many of the files the run lacks, as far as is known."""
        return len(self._missing(run_id, files))

    def _missing(self, run_id: str, files: Sequence[RunFile]) -> list[RunFile]:
        known = self._known.get(run_id, {})
        return [file for file in files if known.get(file.name) != file.made_of]

    def _list(self, run_id: str, files: Sequence[RunFile], *, complete: bool) -> dict[str, str]:
        """The run's files. A name says nothing of the content: unless all were complete, only files that never change count."""
        with _as_unavailable():
            names = set(self._names(run_id, {str(PurePosixPath(file.name).parent) for file in files}))
        return {file.name: file.made_of for file in files if file.name in names and (complete or file.fixed)}

    def _names(self, run_id: str, folders: Iterable[str]) -> Iterator[str]:
        for folder in sorted(folders):
            yield from (info.path for info in self._reader.list_artifacts(run_id, None if folder == "." else folder))

    def _upload(self, run_id: str, file: RunFile, body: bytes) -> None:
        writer, name = self._writer(), PurePosixPath(file.name)
        with _as_unavailable(), TemporaryDirectory() as folder:
            path = Path(folder, name.name)
            path.write_bytes(body)
            writer.log_artifact(run_id, str(path), None if len(name.parts) == 1 else str(name.parent))
        self._known[run_id][file.name] = file.made_of
        self.added += 1


def try_storing(uri: str, place: str) -> str:
    """Store a small file below `place`, an artifact URI, find it and delete it. Returns the file if it cannot be deleted, else "".

    Raises ArtifactsUnavailable where it cannot be stored.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    name = f"check-{uuid.uuid4().hex}"
    _require_reachable(uri, place)
    with _as_unavailable(), TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.txt")
        file.write_text(name)
        repository = get_artifact_repository(place, tracking_uri=uri)
        repository.log_artifact(str(file), name)
        if [info.path for info in repository.list_artifacts(name)] != [f"{name}/{file.name}"]:
            raise SweepError(f"{name} was stored and is not there")
        try:
            repository.delete_artifacts(name)
        except Exception:  # a run deletes nothing
            return f"{place}/{name}"
    return ""


@contextmanager
def _as_unavailable() -> Iterator[None]:
    """Any error as ArtifactsUnavailable: the artifact store may be a folder, a server or a cloud's store, each with its own errors."""
    try:
        yield
    except Exception as error:
        raise ArtifactsUnavailable(f"{type(error).__name__}: {error_text(error)}") from error


def _require_reachable(uri: str, place: str) -> None:
    """Refuse a folder of another machine: MLflow's client would create it on this one."""
    local = urlsplit(place).scheme in ("", "file")
    host = urlsplit(uri).hostname if uri.startswith("http") else None
    if local and host and host not in _LOOPBACK:
        raise ArtifactsUnavailable(f"MLflow at {host} keeps files in its own folder {place}; start it with --serve-artifacts")
