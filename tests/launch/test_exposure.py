"""Keys, certificates and addresses are checked before anything starts."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from certificates import make_certificate
from rows import each_row

from tokasaurus import entry
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.parser import parse_command_line
from tokasaurus.errors import ConfigError
from tokasaurus.launch.exposure import (
    ADMIN_KEY_VARIABLE,
    API_KEY_VARIABLE,
    check_certificate,
    open_door_warning,
    with_keys,
)

KEY = "sk-very-secret"


def test_keys_of_all_sources_are_accepted(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\nfrom-file\n\n  another \n")
    config = EngineConfig(api_key=("a", "b"), api_key_file=str(file))
    environment = {API_KEY_VARIABLE: "from-environment, last"}
    assert with_keys(config, environment).api_key == (
        *("a", "b", "from-file", "another", "from-environment", "last"),
    )
    assert with_keys(EngineConfig(), {}).api_key is None


def test_admin_keys_have_sources_of_their_own(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the trainer\nfrom-file\n")
    config = EngineConfig(admin_api_key=("a",), admin_api_key_file=str(file), api_key=("user",))
    found = with_keys(config, {ADMIN_KEY_VARIABLE: "b, c"})
    assert found.admin_api_key == ("a", "from-file", "b", "c")
    assert found.api_key == ("user",)
    assert with_keys(EngineConfig(), {API_KEY_VARIABLE: "x"}).admin_api_key is None


def test_a_source_without_admin_keys_is_an_error(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="admin_api_key_file="):
        with_keys(EngineConfig(admin_api_key_file=str(file)), {})
    with pytest.raises(ConfigError, match=ADMIN_KEY_VARIABLE):
        with_keys(EngineConfig(), {ADMIN_KEY_VARIABLE: ""})
    with pytest.raises(ConfigError, match="admin_api_key is an empty list"):
        with_keys(EngineConfig(admin_api_key=()), {})
    assert entry.run(["admin_api_key='a b'", "port=0"], {}) == 2


def test_admin_keys_are_never_shown(capsys):
    with pytest.raises(SystemExit):
        parse_command_line([f"admin_api_key={KEY}", "--show"], {})
    assert entry.run([f"admin_api_key='{KEY} with a space'", "port=0"], {}) == 2
    captured = capsys.readouterr()
    assert "# admin_api_key is set" in captured.out
    assert KEY not in captured.out + captured.err
    assert KEY not in repr(EngineConfig(admin_api_key=(KEY,)))


@each_row("content", [None, b"", b"# nothing\n\n", b"\xff\xfe"])
def test_a_key_file_without_keys_is_an_error(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="api_key_file="):
        with_keys(EngineConfig(api_key_file=str(file)), {})


def test_an_empty_flag_or_variable_of_keys_is_an_error():
    with pytest.raises(ConfigError, match=API_KEY_VARIABLE):
        with_keys(EngineConfig(), {API_KEY_VARIABLE: " , "})
    with pytest.raises(ConfigError, match="api_key"):
        with_keys(EngineConfig(api_key=()), {})


def test_keys_are_never_shown(capfd, monkeypatch):
    config = parse_command_line([f"api_key={KEY},{KEY}2"], {})
    assert config.api_key == (KEY, f"{KEY}2")
    assert KEY not in repr(config)
    with pytest.raises(SystemExit):
        parse_command_line([f"api_key={KEY}", "port=1", "--show"], {})
    shown = capfd.readouterr().out
    assert KEY not in shown
    assert "port: 1\n" in shown
    assert "# api_key is set" in shown
    for arguments in (
        [f"api_key=[{KEY}"],
        [f"api_key={{'a': '{KEY}'}}", "port=x"],
        [f"api_key.x={KEY}"],
        [f"api_kye={KEY}"],
        [f"api_key='{KEY} with a space'"],
        [f"api_key={KEY}\u00e9"],
    ):
        assert entry.run(arguments, {}) == 2
    assert entry.run([], {"OVERRIDES": f"api_key='{KEY}"}) == 2
    with pytest.raises(ConfigError) as error:
        EngineConfig(api_key=KEY)
    assert KEY not in str(error.value)
    captured = capfd.readouterr()
    assert captured.err.count("toka: error:") == 7
    assert KEY not in captured.err + captured.out


def test_certificates_are_checked_before_anything_starts(tmp_path, capfd):
    certificate, key = make_certificate(tmp_path)
    good = EngineConfig(ssl_certfile=certificate, ssl_keyfile=key)
    check_certificate(good)
    (tmp_path / "other").mkdir()
    _, other_key = make_certificate(tmp_path / "other")
    (tmp_path / "text").write_text("no certificate")
    for changes, reason in (
        ({"ssl_certfile": "/no/such/file"}, "ssl_certfile=/no/such/file: No such file"),
        ({"ssl_keyfile": str(tmp_path)}, "ssl_keyfile=.*: Is a directory"),
        ({"ssl_keyfile": other_key}, "key values mismatch"),
        ({"ssl_certfile": str(tmp_path / "text")}, "ssl_certfile="),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_certificate(dataclasses.replace(good, **changes))
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "other").mkdir()
    locked = make_certificate(tmp_path / "other", "-passout", "pass:xyz")
    with pytest.raises(ConfigError, match="password"):
        check_certificate(EngineConfig(ssl_certfile=locked[0], ssl_keyfile=locked[1]))
    assert entry.run([f"ssl_certfile={certificate}", "port=0"], {}) == 2
    assert "ssl_certfile is set and ssl_keyfile is not" in capfd.readouterr().err


def test_wrong_origins_are_errors(capfd):
    for origin in ("example.org", "https://example.org/", "https://example.org/path"):
        assert entry.run([f"cors_origins={origin}", "port=0"], {}) == 2
        assert origin in capfd.readouterr().err


def test_wrong_host_names_are_errors(capfd):
    for name in ("http://example.org", "example.org:80", "example.org/x", "a b", "**", "a.*"):
        assert entry.run([f"allowed_hosts='{name}'", "port=0"], {}) == 2
        assert f"allowed_hosts: {name!r} is not" in capfd.readouterr().err


def test_an_engine_open_to_other_machines_without_a_key_is_warned_of():
    closed, opened = EngineConfig(), EngineConfig(host="0.0.0.0")
    assert open_door_warning(closed, "127.0.0.1") is None
    assert open_door_warning(closed, "::1") is None
    assert open_door_warning(closed, "127.9.9.9") is None
    assert API_KEY_VARIABLE in (open_door_warning(opened, "0.0.0.0") or "")
    assert open_door_warning(opened, "::")
    assert open_door_warning(dataclasses.replace(opened, api_key=("k",)), "0.0.0.0") is None
