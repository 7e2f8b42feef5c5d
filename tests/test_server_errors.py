"""Tracking servers that refuse, or that can't be trusted."""

from __future__ import annotations

import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from effv2.core.errors import InputError
from effv2.tracking.store import open_store


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with one status and one body."""

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
    """Return a function that starts such a server and points MLflow at it. A certificate turns on TLS."""
    servers: list[http.server.HTTPServer] = []

    def start(status: int, body: bytes, scheme: str = "http", certificate: Path | None = None) -> None:
        handler = type("Handler", (Refusing,), {"status": status, "body": body})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.handle_error = lambda *_: None  # type: ignore[method-assign]  # for clients that hang up
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
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "ask the administrator of the server"),
        (500, b"oops", "start the server or correct the address"),
        (200, b"<html>another site</html>", "start the server or correct the address"),
    ],
)
def test_a_server_that_refuses(serve: Callable[..., None], status: int, body: bytes, remedy: str) -> None:
    serve(status, body)
    with pytest.raises(InputError, match=f"MLFLOW_TRACKING_URI http://.*{remedy}"):
        open_store("")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_an_untrusted_certificate_is_named(serve: Callable[..., None], tmp_path: Path) -> None:
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


def test_https_to_a_server_without_tls_is_named(serve: Callable[..., None]) -> None:
    serve(200, b"{}", "https")
    with pytest.raises(InputError, match="doesn't use TLS; use an http:// address"):
        open_store("")
