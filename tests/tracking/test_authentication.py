"""Every form of authentication that MLflow's client has, against a real server behind a proxy that demands it."""

from __future__ import annotations

import base64
import datetime
import http.client
import io
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Console
from servers import MlflowServer
from tracked_sweep import manifest

from orchestration.errors import TrackingError
from orchestration.preflight.check import check_tracking
from orchestration.record.manifest import dump_manifest, manifest_key
from orchestration.store.open import open_store
from orchestration.sweep import open_sweep
from orchestration.tracking.sync import sync
from orchestration.tracking.ui_server import ui

BASIC = f"Basic {base64.b64encode(b'me:p:w@').decode()}"


@dataclass
class Gate:
    """A reverse proxy for `/team/mlflow`. It asks for the header `demanded`, and with a certificate speaks TLS."""

    server: MlflowServer
    demanded: str | None = None
    refusal: int = 401
    certificate: Path | None = None
    clients: bool = False

    def __post_init__(self) -> None:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if gate.demanded and self.headers.get("Authorization") != gate.demanded:
                    return self.reply(gate.refusal, b"<p>who are you?", "text/html")
                if not self.path.startswith("/team/mlflow/"):
                    return self.reply(404, b"<p>not here", "text/html")
                upstream = http.client.HTTPConnection("127.0.0.1", gate.server.port, timeout=20)
                kept = {name: value for name, value in self.headers.items() if name not in ("Host", "Authorization", "Accept-Encoding")}
                upstream.request(self.command, self.path.removeprefix("/team/mlflow"), body, kept)
                reply = upstream.getresponse()
                return self.reply(reply.status, reply.read(), reply.headers.get("Content-Type", ""))

            def reply(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            setattr(Handler, f"do_{method}", Handler.answer)
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that trusts no certificate hangs up
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            if self.clients:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.certificate)
            self._listener.socket = context.wrap_socket(self._listener.socket, server_side=True)
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    @property
    def root(self) -> str:
        return f"http{'s' if self.certificate else ''}://127.0.0.1:{self._listener.server_address[1]}"

    @property
    def uri(self) -> str:
        return f"{self.root}/team/mlflow"

    def close(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(
        made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + key.private_bytes(serialization.Encoding.PEM, *plain)
    )
    return path


@pytest.fixture
def gate(mlflow_server: MlflowServer, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Gate]]:
    made: list[Gate] = []
    monkeypatch.setenv("HOME", str(tmp_path))

    def make(*, tls: bool = False, **changes: Any) -> Gate:
        made.append(Gate(mlflow_server, certificate=certificate if tls else None, **changes))
        return made[-1]

    yield make
    for each in made:
        each.close()


def used(uri: str, folder: Path) -> list[str]:
    """What check, sync and ui say of MLflow at `uri`."""
    store = open_store(str(folder / "store"))
    store.write(manifest_key("demo", "abc"), dump_manifest(manifest(1, sweep="demo", status="finished")))
    (folder / "demo.yaml").write_text(f"{{name: demo, preset: digits, store: {folder}/store}}")
    console = Console(file=io.StringIO(), width=40)
    ui(open_sweep(folder / "demo.yaml", [], data_root=None, environment={"MLFLOW_TRACKING_URI": uri}), console, environment={})
    found = check_tracking(uri, "demo")
    try:
        synced = str(sync(uri, "demo", store))
    except TrackingError as error:
        synced = f"refused: {error}"
    return [f"{found.level}: {found.detail}", synced, console.file.getvalue()]


FORMS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a path below the host": ({}, {}),
    "token": ({"demanded": "Bearer a-token"}, {"MLFLOW_TRACKING_TOKEN": "a-token"}),
    "basic": ({"demanded": BASIC}, {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "p:w@"}),
    "credentials file": ({"demanded": BASIC}, {}),
    "in the address": ({"demanded": BASIC}, {}),
    "insecure": ({"tls": True, "demanded": "Bearer a-token"}, {"MLFLOW_TRACKING_TOKEN": "a-token", "MLFLOW_TRACKING_INSECURE_TLS": "true"}),
    "server certificate": ({"tls": True}, {"MLFLOW_TRACKING_SERVER_CERT_PATH": "CERTIFICATE"}),
    "client certificate": (
        {"tls": True, "clients": True},
        {"MLFLOW_TRACKING_SERVER_CERT_PATH": "CERTIFICATE", "MLFLOW_TRACKING_CLIENT_CERT_PATH": "CERTIFICATE"},
    ),
}


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
@pytest.mark.parametrize("form", FORMS)
def test_check_sync_and_ui_pass_with_it(form, gate, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demands, environment = FORMS[form]
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("CERTIFICATE", str(certificate)))
    if form == "credentials file":
        (tmp_path / ".mlflow").mkdir()
        (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = p:w@\n")
    uri = gate(**demands).uri
    used(uri.replace("//", "//me:p%3Aw%40@") if form == "in the address" else uri, tmp_path)
    checked, synced, printed = used(uri.replace("//", "//me:p%3Aw%40@") if form == "in the address" else uri, tmp_path)
    assert checked.startswith(f"ok: {uri}: works; "), checked
    assert "refused" not in synced
    assert "could not" not in synced
    assert printed.startswith(f"MLflow: {uri}/#/experiments/"), printed


@pytest.mark.parametrize("refusal", [401, 403, "path", "certificate"])
def test_a_refusal_is_said_and_never_means_that_all_is_there(refusal, gate, tmp_path: Path) -> None:
    if refusal == "certificate":
        uri = gate(tls=True).uri
    elif refusal == "path":
        uri = f"{gate().root}/other"
    else:
        uri = gate(demanded="Bearer another", refusal=refusal).uri
    checked, synced, printed = used(uri, tmp_path)
    assert checked.startswith("fault: "), checked
    assert synced.startswith("refused: "), synced
    assert "it did not name the experiment demo: " in printed
    assert "no experiment demo yet" not in printed
    said = {401: "401", 403: "403", "path": "404", "certificate": "CERTIFICATE_VERIFY_FAILED"}[refusal]
    assert said in checked
    assert said in printed
