"""The commands and an engine that serves HTTPS."""

import io
import ssl

import pytest
from certificates import make_certificate

from tokasaurus.scripts import chat, ping


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def tls_engine(engine, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    engine.socket = context.wrap_socket(engine.socket, server_side=True)
    engine.handle_error = lambda request, address: None  # of clients that turn away
    return engine


def test_ping(tls_engine, certificate, capsys):
    flags = [f"port={tls_engine.port}", f"ca_file={certificate[0]}"]
    assert ping.main(["prompt=a", *flags]) == 0
    assert ping.main(["prompt=a", "https=T", *flags]) == 0
    assert capsys.readouterr().out == "a!0\na!0\n"


def test_chat(tls_engine, certificate, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n"))
    assert chat.main([f"port={tls_engine.port}", f"ca_file={certificate[0]}"]) == 0
    assert capsys.readouterr().out == "one~two~\n"


@pytest.mark.parametrize("main", [lambda flags: ping.main(["prompt=a", *flags]), chat.main])
def test_who_is_not_trusted_is_not_told_anything(tls_engine, capsys, main):
    assert main([f"port={tls_engine.port}", "https=T"]) == 1
    assert "ca_file=" in capsys.readouterr().err
    assert not tls_engine.requests


def test_https_without_the_flag(tls_engine, capsys):
    assert ping.main(["prompt=a", f"port={tls_engine.port}"]) == 1
    assert "https=T" in capsys.readouterr().err


def test_plain_http_with_the_flag(engine, capsys):
    assert ping.main(["prompt=a", f"port={engine.port}", "https=T"]) == 1
    assert "does not answer in HTTPS" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_that_cannot_be_read(tmp_path, capsys, content):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    assert ping.main(["prompt=a", f"ca_file={path}"]) == 2
    assert "ca_file=" in capsys.readouterr().err
