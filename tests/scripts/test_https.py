"""The commands with an engine that serves HTTPS."""

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
    engine.handle_error = lambda request, address: None  # clients that break off
    return engine


def test_ping_over_https(tls_engine, certificate, capsys):
    flags = [f"port={tls_engine.port}", f"ca_file={certificate[0]}"]
    assert ping.main(["prompt=a", *flags]) == 0
    assert ping.main(["prompt=a", "https=T", *flags]) == 0
    assert capsys.readouterr().out == "a!0\na!0\n"


def test_chat_over_https(tls_engine, certificate, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n"))
    assert chat.main([f"port={tls_engine.port}", f"ca_file={certificate[0]}"]) == 0
    assert capsys.readouterr().out == "one~two~\n"


@pytest.mark.parametrize("main", [lambda flags: ping.main(["prompt=a", *flags]), chat.main])
def test_an_untrusted_server_receives_no_request(tls_engine, capsys, main):
    assert main([f"port={tls_engine.port}", "https=T"]) == 1
    assert "ca_file=" in capsys.readouterr().err
    assert not tls_engine.requests


def test_plain_http_to_an_https_server_is_explained(tls_engine, capsys):
    assert ping.main(["prompt=a", f"port={tls_engine.port}"]) == 1
    assert "https=T" in capsys.readouterr().err


def test_https_to_a_plain_http_server_is_explained(engine, capsys):
    assert ping.main(["prompt=a", f"port={engine.port}", "https=T"]) == 1
    assert "does not answer in HTTPS" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_unreadable_certificates_are_errors(tmp_path, capsys, content):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    assert ping.main(["prompt=a", f"ca_file={path}"]) == 2
    assert "ca_file=" in capsys.readouterr().err
