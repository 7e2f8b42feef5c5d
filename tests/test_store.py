"""Trouble with the tracking store or with resources is one sentence that names the remedy."""

from __future__ import annotations

import http.server
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mlflow.entities import Experiment

from effv2.core.errors import InputError, RunError, what_ran_out
from effv2.tracking import store
from effv2.tracking.addresses import shown_uri
from effv2.tracking.store import open_store


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers everything with one status and one body."""

    status, body = 200, b""

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return what starts such a server, with TLS where a certificate is given, and points MLflow at it."""
    servers: list[http.server.HTTPServer] = []

    def start(status: int, body: bytes, scheme: str = "http", certificate: Path | None = None) -> None:
        handler = type("Handler", (Refusing,), {"status": status, "body": body})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://127.0.0.1:{server.server_port}")

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "remedy"),
    [
        (401, b"You are not authenticated.", "set MLFLOW_TRACKING_USERNAME"),
        (403, b"Invalid Host header - possible DNS rebinding attack detected", "start it with --allowed-hosts"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "ask whoever keeps the server"),
        (500, b"oops", "start the server or correct the address"),
        (200, b"<html>another site</html>", "start the server or correct the address"),
    ],
)
def test_a_server_that_refuses(serve: Callable[..., None], status: int, body: bytes, remedy: str) -> None:
    serve(status, body)
    with pytest.raises(InputError, match=f"MLFLOW_TRACKING_URI http://.*{remedy}"):
        open_store("")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_a_certificate_that_nobody_vouches_for(serve: Callable[..., None], tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*command, "-keyout", certificate, "-out", certificate.with_suffix(".crt")],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    with certificate.open("a") as file:
        file.write(certificate.with_suffix(".crt").read_text())
    serve(200, b"{}", "https", certificate)
    with pytest.raises(InputError, match="certificate can't be verified; set MLFLOW_TRACKING_SERVER_CERT_PATH"):
        open_store("")


@pytest.mark.parametrize("location", ["mlflow-artifacts:/1", "dbfs:/runs/1", "s3://bucket/1"])
def test_artifacts_that_a_server_keeps_need_no_folder_here(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    store._check_artifacts(Experiment("1", "kept elsewhere", location, "active"))
    with pytest.raises(InputError, match="can't be written, where its artifacts go"):
        store._check_artifacts(Experiment("1", "kept here", "file:///runs/1", "active"))


def test_tls_where_there_is_none(serve: Callable[..., None]) -> None:
    serve(200, b"{}", "https")
    with pytest.raises(InputError, match="speaks no TLS; use an http:// address"):
        open_store("")


def test_no_password_is_shown_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in (
        "postgresql://user:secret@host/db",
        "postgresql://host/db?user=u&password=secret&a=b",
        "http://u:secret@h",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert "secret" not in shown_uri()


def full_disk_of_torch() -> None:
    try:
        raise OSError(28, "No space left on device", "/data/weights.pt")
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904


def no_memory_on_the_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_memory_on_the_host() -> None:
    torch.empty(2**60)


@pytest.mark.parametrize(
    ("runs_out", "sentence"),
    [
        (no_memory_on_the_device, "memory is full; lower optimiser.batch_size or data.image_size"),
        (no_memory_on_the_host, "memory is full; lower optimiser.batch_size or data.image_size"),
        (full_disk_of_torch, "disk is full at /data/weights.pt; free space"),
    ],
)
def test_what_ran_out_is_one_sentence(runs_out: Callable[[], None], sentence: str) -> None:
    with pytest.raises(RunError, match=sentence), what_ran_out():
        runs_out()


def test_other_faults_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), what_ran_out():
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="shape"), what_ran_out():
        raise RuntimeError("shape")
