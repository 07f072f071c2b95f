"""Where a real server listens: TLS and its certificates, Unix sockets, and the names that it answers to."""

import asyncio
import contextlib
import http.client
import json
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from octavo.errors import ConfigError
from octavo.server.config import ServerConfig
from octavo.server.edge.access_log import AccessLog
from octavo.server.edge.certificates import Certificates
from octavo.server.edge.hosts import host_check
from octavo.server.edge.http_protocol import Edge
from octavo.server.edge.limits import ConnectionLimit
from octavo.server.edge.tls import TlsListener
from octavo.server.errors import ApiError
from octavo.server.listeners import unix_listener
from server_process import ServerProcess

BODY = {"prompt": "The module", "max_tokens": 3, "ignore_eos": True}
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


class Pair(NamedTuple):
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


def issue(folder: Path, name: str, *options: str) -> Pair:
    """Make a certificate for `name` and 127.0.0.1; signed by itself if `options` name no authority."""
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"]
    command += ["-keyout", str(pair.key), "-out", str(pair.certificate), *(options or ["-nodes"])]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return pair


def trusting(pair: Pair, client: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pair.certificate))
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Secured(NamedTuple):
    server: ServerProcess
    pair: Pair
    client: Pair
    other: Pair
    trusting: ssl.SSLContext

    def served_name(self) -> str:
        """Return the name in the certificate that a new connection is shown."""
        with (
            socket.create_connection(self.server.address, timeout=10) as raw,
            self.trusting.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
        ):
            certificate: Any = connection.getpeercert()
        return str(dict(field for [field] in certificate["subject"])["commonName"])


@pytest.fixture(scope="module")
def secured(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    pair, client, other = (issue(folder, name) for name in ("localhost", "client", "other.example"))
    flags = ["--ssl-certfile", str(pair.certificate), "--ssl-keyfile", str(pair.key), "--max-connections", "4"]
    flags += ["--ssl-ca-certs", str(client.certificate), "--ssl-cert-reqs", "1", "--header-timeout", "1"]
    trusted = trusting(pair)
    trusted.load_verify_locations(other.certificate)
    with ServerProcess(tiny_llama, *flags) as server:
        yield Secured(server, pair, client, other, trusted)


@needs_openssl
def test_answers_and_streams_come_over_tls(secured: Secured) -> None:
    assert secured.server.url.startswith("https://") and "curl https://" in secured.server.banner
    with httpx.Client(base_url=secured.server.url, verify=trusting(secured.pair), timeout=30) as http:
        assert http.post("/v1/completions", json=BODY).json()["usage"]["completion_tokens"] == 3
        with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        many_records = BODY | {"metadata": {"text": "x" * 1_000_000}}
        assert http.post("/v1/completions", json=many_records).status_code == 200
        assert len(http.get("/openapi.json").content) > 50_000
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{secured.server.url}/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{secured.server.url}/health".replace("https", "http"), timeout=30)


@needs_openssl
def test_the_request_of_a_client_that_leaves_ends(secured: Secured) -> None:
    content = json.dumps(BODY | {"max_tokens": 480, "n": 128}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(secured.server.address, timeout=10) as raw:
        trusting(secured.pair).wrap_socket(raw, server_hostname="localhost").sendall(head.encode() + content)
    with httpx.Client(base_url=secured.server.url, verify=trusting(secured.pair), timeout=30) as http:
        until(lambda: http.get("/get_load").json()[0]["num_reqs"] == 0)


@needs_openssl
def test_idle_clients_do_not_hold_up_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    """Nor one that does not answer when its connection is closed."""
    pair = issue(tmp_path, "localhost")
    flags = ["--ssl-certfile", str(pair.certificate), "--ssl-keyfile", str(pair.key), "--drain-timeout", "60"]
    with (
        ServerProcess(tiny_llama, *flags) as server,
        socket.create_connection(server.address, timeout=10) as raw,
        trusting(pair).wrap_socket(raw, server_hostname="localhost") as fresh,
        socket.create_connection(server.address, timeout=10) as raw,
        trusting(pair).wrap_socket(raw, server_hostname="localhost") as used,
    ):
        used.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert used.recv(1000).startswith(b"HTTP/1.1 200") and fresh.version()
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        assert time.monotonic() - began < 10


@needs_openssl
def test_a_client_may_show_a_certificate_but_not_a_wrong_one(secured: Secured) -> None:
    right, wrong = trusting(secured.pair, secured.client), trusting(secured.pair, secured.other)
    assert httpx.get(f"{secured.server.url}/health", verify=right).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{secured.server.url}/health", verify=wrong)


@needs_openssl
def test_old_versions_of_tls_are_refused(secured: Secured) -> None:
    context = trusting(secured.pair)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(secured.server.address, timeout=10) as raw, pytest.raises(OSError):
        context.wrap_socket(raw, server_hostname="localhost")


@needs_openssl
def test_slow_handshakes_end_and_keep_nobody_out(secured: Secured) -> None:
    slow = [socket.create_connection(secured.server.address, timeout=10) for _ in range(6)]  # two more than the limit
    for each in slow:
        each.sendall(b"\x16\x03\x01")  # the beginning of a record
    assert httpx.get(f"{secured.server.url}/health", verify=trusting(secured.pair), timeout=10).status_code == 200
    began = time.monotonic()
    for each in slow:
        with contextlib.suppress(ConnectionResetError):
            assert each.recv(100) == b""
        each.close()
    assert time.monotonic() - began < 8


@needs_openssl
def test_handshakes_count_as_idle_connections(tmp_path: Path) -> None:
    pair = issue(tmp_path, "localhost")
    config = ServerConfig(ssl_certfile=str(pair.certificate), ssl_keyfile=str(pair.key), header_timeout=60)
    edge = Edge(config, ConnectionLimit(4), AccessLog("none", None))

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            accepting = TlsListener(listener, Certificates(config), asyncio.Protocol, edge)
            slow = [await asyncio.open_connection(*listener.getsockname()) for _ in range(6)]
            async with asyncio.timeout(20):
                assert [await reader.read() for reader, _ in slow[:2]] == [b"", b""]
            assert not any(reader.at_eof() for reader, _ in slow[2:])
            edge.connections.close_idle()
            async with asyncio.timeout(20):
                assert [await reader.read() for reader, _ in slow[2:]] == [b""] * 4
            accepting.close()
            for _, writer in slow:
                writer.close()

    asyncio.run(main())


@needs_openssl
def test_a_changed_certificate_is_served_and_a_broken_one_is_not(secured: Secured) -> None:
    assert secured.served_name() == "localhost"
    for before, after in zip(secured.pair, secured.other, strict=True):
        copy = before.with_suffix(".new")
        shutil.copy(after, copy)
        copy.replace(before)
    until(lambda: secured.served_name() == "other.example")
    secured.pair.key.write_text("-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----\n")
    until(lambda: "the certificate of before applies" in secured.server.stderr())
    assert secured.served_name() == "other.example"


@needs_openssl
def test_clients_without_a_certificate_can_be_refused(tiny_llama: Path, tmp_path: Path) -> None:
    pair, client = issue(tmp_path, "localhost", "-passout", "pass:secret"), issue(tmp_path, "client")
    flags = ["--ssl-certfile", str(pair.certificate), "--ssl-keyfile", str(pair.key), "--ssl-cert-reqs", "2"]
    flags += ["--ssl-ca-certs", str(client.certificate), "--ssl-keyfile-password", "secret"]
    with ServerProcess(tiny_llama, *flags) as server:
        assert "--cert CLIENT.pem" in server.banner
        assert httpx.get(f"{server.url}/health", verify=trusting(pair, client)).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health", verify=trusting(pair))


@needs_openssl
def test_wrong_files_are_errors_of_one_line(tmp_path: Path) -> None:
    pair, other = issue(tmp_path, "a"), issue(tmp_path, "b")
    locked, empty = issue(tmp_path, "c", "-passout", "pass:secret"), tmp_path / "empty"
    empty.touch()

    def error(certificate: Path, key: Path, **more: Any) -> str:
        with pytest.raises(ConfigError) as raised:
            Certificates(ServerConfig(ssl_certfile=str(certificate), ssl_keyfile=str(key), **more))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "cannot be read: No such file" in error(tmp_path / "none", pair.key)
    assert "has no certificate in PEM format" in error(empty, pair.key)
    assert "has no private key in PEM format" in error(pair.certificate, empty)
    assert "is not the key of the certificate" in error(pair.certificate, other.key)
    assert "is encrypted; set ssl_keyfile_password" in error(*locked)
    assert "ssl_keyfile_password is not the password" in error(*locked, ssl_keyfile_password="guess")
    assert "ssl_ca_certs" in error(*pair, ssl_ca_certs=str(empty), ssl_cert_reqs=2)
    for wrong in ({"ssl_keyfile": "x"}, {"ssl_certfile": "x", "ssl_ca_certs": "y"}, {"ssl_cert_reqs": 2}):
        with pytest.raises(ConfigError, match="ssl_"):
            ServerConfig(**wrong)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("s") / "octavo.sock"


def over_unix(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=30)


def test_a_unix_socket(tiny_llama: Path, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))  # and is left, as by a server that was killed
    command = [sys.executable, "-m", "octavo.entrypoints.openai.api_server", "--model", str(tiny_llama)]
    process = subprocess.Popen([*command, "--uds", str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        curl = next(line for line in process.stdout if line.startswith("curl"))
        assert f"--unix-socket {path}" in curl
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with over_unix(path) as client:
            assert client.post("/v1/completions", json=BODY).json()["usage"]["completion_tokens"] == 3
            assert client.get("/v1/models", headers={"Host": "any.example"}).status_code == 200
            _check_half_closed(path)
            _check_disconnected(client, path)
        with pytest.raises(ConfigError, match="is in use"), unix_listener(str(path)):
            pass
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert not path.exists()


def _send(path: Path, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(path))
    head = "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def _check_half_closed(path: Path) -> None:
    """A client that sends nothing more still gets its answer."""
    with _send(path, BODY | {"max_tokens": 400}) as connection:
        connection.shutdown(socket.SHUT_WR)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        assert reply.status == 200 and json.loads(reply.read())["usage"]["completion_tokens"] == 400


def _check_disconnected(client: httpx.Client, path: Path) -> None:
    """The request of a client that has gone is ended."""
    _send(path, BODY | {"max_tokens": 480, "n": 128}).close()
    until(lambda: client.get("/get_load").json()[0]["num_reqs"] == 0)


def test_what_is_no_stale_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket: choose another --uds"), unix_listener(str(path)):
        pass
    assert path.read_text() == "precious"
    with pytest.raises(ConfigError, match="cannot listen on the Unix socket"), unix_listener(f"{path}/none"):
        pass


def test_a_page_cannot_call_a_local_server_under_its_own_name(server: ServerProcess) -> None:
    def status(host: str, path: str = "/v1/models", method: str = "GET") -> int:
        return httpx.request(method, server.url + path, headers={"Host": host}).status_code

    for host in ("localhost", "LOCALHOST:99", "localhost.", "app.localhost", "127.0.0.1:1", "[::1]:80", "10.1.2.3"):
        assert status(host) == 200, host
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[evil]", ""):
        assert status(host) == status(host, method="OPTIONS") == status(host, "/v1/chat/completions", "POST") == 403
    assert status("evil.example", "/health") == 200
    error = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).json()["error"]
    assert error["code"] == "host_not_allowed" and "--allowed-hosts" in error["message"]
    connection = http.client.HTTPConnection(*server.address)
    connection.putrequest("GET", "/v1/models", skip_host=True)
    connection.putheader("Host", "localhost")
    connection.putheader("Host", "evil.example")
    connection.endheaders()
    assert connection.getresponse().status == 403


@pytest.mark.parametrize(
    ("settings", "refused", "served"),
    [
        ({"host": "0.0.0.0"}, None, b"any.example"),
        ({"host": "127.0.0.1", "api_key": ["k"]}, None, b"any.example"),
        ({"host": "127.0.0.1", "uds": "/run/x"}, None, b"any.example"),
        ({"host": "127.0.0.1", "allowed_hosts": "*"}, None, b"any.example"),
        ({"host": "::1"}, b"any.example", b"[::1]:8000"),
        ({"host": "localhost"}, b"any.example", b"localhost:8000"),
        ({"host": "0.0.0.0", "allowed_hosts": "A.example, *.b.example"}, b"b.example", b"a.example:443"),
        ({"host": "0.0.0.0", "allowed_hosts": "A.example, *.b.example"}, b"xb.example", b"c.b.example"),
        ({"host": "127.0.0.1", "allowed_hosts": "a.example", "api_key": ["k"]}, b"c.example", b"localhost"),
    ],
)
def test_which_names_are_served(settings: dict[str, Any], refused: bytes | None, served: bytes) -> None:
    check = host_check(ServerConfig(**settings))
    assert (check is None) == (refused is None)
    if check is not None and refused is not None:
        check.check([(b"host", served)])
        with pytest.raises(ApiError, match="--allowed-hosts"):
            check.check([(b"host", refused)])
