"""Certificates: the files of TLS, which are read again after a change."""

import ssl
from pathlib import Path

from octavo.errors import ConfigError
from octavo.follow import follow
from octavo.server.config import ServerConfig


class Certificates:
    """The server's certificate and key, and the authorities whose certificates clients may present.

    Attributes:
        context: for new connections. Connections that are open keep the one with which they began.

    Raises:
        ConfigError: A file cannot be read or is wrong.
    """

    context: ssl.SSLContext

    def __init__(self, config: ServerConfig):
        self._config = config
        files = (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)
        follow([Path(file) for file in files if file is not None], self._read, "certificate")

    def _read(self) -> None:
        self.context = tls_context(self._config)


def tls_context(config: ServerConfig) -> ssl.SSLContext:
    """Return TLS 1.2 and newer with the files of `config`. Raises ConfigError."""
    assert config.ssl_certfile is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # which costs the server more than the client
    context.set_alpn_protocols(["http/1.1"])
    _load_key(context, config.ssl_certfile, config.ssl_keyfile or config.ssl_certfile, config.ssl_keyfile_password)
    if config.ssl_ca_certs is not None:
        _read("ssl_ca_certs", config.ssl_ca_certs, "CERTIFICATE")
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"ssl_ca_certs: {config.ssl_ca_certs} is damaged: {error}") from None
    context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    return context


def _load_key(context: ssl.SSLContext, certificate: str, key: str, password: str | None) -> None:
    _read("ssl_certfile", certificate, "CERTIFICATE")
    is_encrypted = "ENCRYPTED" in _read("ssl_keyfile", key, "PRIVATE KEY")
    if is_encrypted and password is None:
        raise ConfigError(f"ssl_keyfile: the key in {key} is encrypted; set ssl_keyfile_password")
    try:
        context.load_cert_chain(certificate, key, lambda: password or "")
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"ssl_keyfile: {key} is not the key of the certificate in {certificate}") from None
        if is_encrypted:
            raise ConfigError(f"ssl_keyfile_password is not the password of the key in {key}") from None
        raise ConfigError(f"ssl_certfile: {certificate} or its key in {key} is damaged: {error}") from None


def _read(setting: str, file: str, part: str) -> str:
    """Return the text of a file in PEM format. Raises ConfigError."""
    try:
        text = Path(file).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise ConfigError(f"{setting}: {file} cannot be read: {error.strerror or error}") from None
    if f"{part}-----" not in text:
        raise ConfigError(f"{setting}: {file} has no {part.lower()} in PEM format")
    return text
