"""TLS on the service's own port: the files that it needs, and whether they can be used."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from service.api.keys import AccessError


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Files of PEM; without a certificate the port speaks plain HTTP."""

    certfile: Path | None = None
    keyfile: Path | None = None  # by default in certfile
    keyfile_password: str | None = field(default=None, repr=False)


def check_tls(config: TlsConfig) -> None:
    """Raises AccessError, which names the setting. Afterwards a server can load the files without asking anybody."""
    if config.certfile is None:
        for name in ("keyfile", "keyfile_password"):
            if getattr(config, name) is not None:
                raise AccessError(f"ssl_{name}: needs ssl_certfile")
        return
    for name, file in (("ssl_certfile", config.certfile), ("ssl_keyfile", config.keyfile)):
        try:
            if file is not None:
                file.read_bytes()
        except OSError as error:
            raise AccessError(f"{name}: {file}: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(config.certfile)
    except ssl.SSLError:
        raise AccessError(f"ssl_certfile: {config.certfile}: has no certificate (PEM)") from None
    asked_for_password = False

    def password() -> str:  # without this, OpenSSL would ask at the terminal
        nonlocal asked_for_password
        asked_for_password = True
        return config.keyfile_password or ""

    try:
        context.load_cert_chain(config.certfile, config.keyfile, password)
    except (ssl.SSLError, ValueError) as error:  # ValueError: the password is too long
        if asked_for_password:
            wrong = "is wrong for" if config.keyfile_password else "is needed by"
            raise AccessError(f"ssl_keyfile_password: {wrong} {config.keyfile or config.certfile}") from None
        setting = "ssl_certfile" if config.keyfile is None else "ssl_keyfile"
        mismatch = getattr(error, "reason", None) == "KEY_VALUES_MISMATCH"
        problem = f"has another key than that of {config.certfile}" if mismatch else "has no key (PEM)"
        raise AccessError(f"{setting}: {config.keyfile or config.certfile}: {problem}") from None
