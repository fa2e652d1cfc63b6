"""TLS: files that cannot be used are refused by the setting that is to be mended, and nobody is asked at a terminal."""

from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from service.api.keys import AccessError
from service.api.tls import TlsConfig, check_tls

PASSWORD = "the password of nobody"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem and its key.pem; locked.pem is that key with a password, both.pem both in one, other.pem another key."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    certificate, key = issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes()
    locked = serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(PASSWORD.encode()),
    )
    for name, content in {
        "cert": certificate,
        "key": key,
        "locked": locked,
        "both": key + certificate,
        "other": other.private_key_pem.bytes(),
        "junk": b"\x00 no PEM",
        "empty": b"",
    }.items():
        (folder / f"{name}.pem").write_bytes(content)
    return folder


def config(folder: Path, cert: str | None, key: str | None = None, password: str | None = None) -> TlsConfig:
    return TlsConfig(
        certfile=folder / f"{cert}.pem" if cert else None,
        keyfile=folder / f"{key}.pem" if key else None,
        keyfile_password=password,
    )


@pytest.mark.parametrize(
    ("cert", "key", "password"),
    [(None, None, None), ("cert", "key", None), ("both", None, None), ("cert", "locked", PASSWORD)],
)
def test_files_that_can_be_used(folder: Path, cert: str | None, key: str | None, password: str | None) -> None:
    check_tls(config(folder, cert, key, password))


@pytest.mark.parametrize(
    ("cert", "key", "password", "message"),
    [
        (None, "key", None, "ssl_keyfile: needs ssl_certfile"),
        (None, None, PASSWORD, "ssl_keyfile_password: needs ssl_certfile"),
        ("none", "key", None, "ssl_certfile: {}/none.pem: No such file or directory"),
        ("cert", "none", None, "ssl_keyfile: {}/none.pem: No such file or directory"),
        ("junk", "key", None, "ssl_certfile: {}/junk.pem: has no certificate (PEM)"),
        ("empty", "key", None, "ssl_certfile: {}/empty.pem: has no certificate (PEM)"),
        ("key", "key", None, "ssl_certfile: {}/key.pem: has no certificate (PEM)"),
        ("cert", None, None, "ssl_certfile: {}/cert.pem: has no key (PEM)"),
        ("cert", "junk", None, "ssl_keyfile: {}/junk.pem: has no key (PEM)"),
        ("cert", "cert", None, "ssl_keyfile: {}/cert.pem: has no key (PEM)"),
        ("cert", "other", None, "ssl_keyfile: {}/other.pem: has another key than that of {}/cert.pem"),
        ("cert", "locked", None, "ssl_keyfile_password: is needed by {}/locked.pem"),
        ("cert", "locked", "wrong" + PASSWORD, "ssl_keyfile_password: is wrong for {}/locked.pem"),
        ("cert", "locked", "x" * 5000, "ssl_keyfile_password: is wrong for {}/locked.pem"),
    ],
)
def test_files_that_cannot(folder: Path, cert: str | None, key: str | None, password: str | None, message: str) -> None:
    """One line, which never has the password; nor has a repr of the settings."""
    given = config(folder, cert, key, password)
    with pytest.raises(AccessError) as error:
        check_tls(given)
    assert message.format(folder, folder) == str(error.value)
    if password:
        assert password not in repr(given)
