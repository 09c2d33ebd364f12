"""Models from directories, and from a stand-in for the Hugging Face Hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from quiet_server import QuietServer
from rows import each_row

from tokasaurus.errors import ModelError
from tokasaurus.launch import model_files
from tokasaurus.launch.model_files import find_model, find_tokenizer

SHA = "0123456789" * 4
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "model.safetensors": b"weights",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"the weights again",
}
READ = {"config.json", "tokenizer.json", "model.safetensors", "merges.txt", "chat_template.jinja"}
"""Those of them that an engine reads."""


class FakeHub(QuietServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.failing = False  # answer everything with status 500


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if self.server.failing:
            self._send(500, b"")
        elif path.startswith("/api/models/org/gated"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == "/api/models/org/tiny/revision/main":
            names = [{"rfilename": name} for name in FILES]
            self._send_json({"id": "org/tiny", "sha": SHA, "siblings": names})
        elif path == f"/api/models/org/tiny/tree/{SHA}":
            self._send_json([_entry(name) for name in FILES])
        elif path.startswith(f"/org/tiny/resolve/{SHA}/"):
            name = path.removeprefix(f"/org/tiny/resolve/{SHA}/")
            headers = {"ETag": f'"{_digest(name)}"', "X-Repo-Commit": SHA}
            self._send(200, FILES[name], headers)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send_json(self, body):
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status, data, headers=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


def _digest(name):
    return hashlib.sha1(FILES[name]).hexdigest()


def _entry(name):
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": _digest(name)}


@pytest.fixture
def hub():
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def python(tmp_path):
    """Runs Python in another process: the hub's client reads the environment at its import."""

    def run(*arguments, **environment):
        removed = ("http_proxy", "hf_")
        kept = {k: v for k, v in os.environ.items() if not k.lower().startswith(removed)}
        kept |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"} | environment
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=180)

    return run


DOWNLOAD = ("-m", "tokasaurus.scripts.download")
FIND = (
    "-c",
    "import sys\n"
    "from tokasaurus.launch.model_files import find_model\n"
    "print(find_model(sys.argv[1]))",
)


def names_in(directory):
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()}


@pytest.mark.engine
def test_toka_download_fetches_what_an_engine_reads(hub, python):
    done = python(*DOWNLOAD, "model=org/tiny", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert names_in(directory) == READ


@pytest.mark.engine
def test_toka_download_fetches_chosen_files(hub, python):
    arguments = ["model=org/tiny", "--list", "allow_patterns", "*.txt", "config.json", "list--"]
    done = python(*DOWNLOAD, *arguments, HF_ENDPOINT=hub.url)
    assert names_in(Path(done.stdout.strip())) == {"config.json", "merges.txt"}


@pytest.mark.engine
def test_a_model_is_downloaded_once(hub, python):
    first = python(*FIND, "org/tiny", HF_ENDPOINT=hub.url)
    assert first.returncode == 0, first.stderr
    directory = Path(first.stdout.strip())
    assert names_in(directory) == READ
    hub.failing = True
    again = python(*FIND, "org/tiny", HF_ENDPOINT=hub.url)
    assert again.stdout == first.stdout


@pytest.mark.engine
def test_a_model_from_toka_download_is_found_offline(hub, python):
    done = python(*DOWNLOAD, "model=org/tiny", HF_ENDPOINT=hub.url)
    hub.failing = True
    offline = python(*FIND, "org/tiny", HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url)
    assert offline.stdout == done.stdout, offline.stderr


@pytest.mark.engine
def test_pytest_downloads_the_model_that_the_environment_names(hub, python):
    tests = ("-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests/test_basic.py")
    done = python(*tests, MODEL="org/tiny", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stdout + done.stderr
    hub.failing = True
    offline = python(*FIND, "org/tiny", HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url)
    assert names_in(Path(offline.stdout.strip())) == READ, offline.stderr
    unknown = python(*tests, MODEL="org/unknown", HF_HUB_OFFLINE="1")
    assert unknown.returncode == pytest.ExitCode.USAGE_ERROR
    assert "MODEL: model=org/unknown: no such directory" in unknown.stderr


@pytest.mark.parametrize(
    ("model", "environment", "words"),
    [
        ("org/unknown", {}, ["model=org/unknown", "no such repository", "hf auth login"]),
        ("org/gated", {}, ["model=org/gated", "gated", "/org/gated", "HF_TOKEN"]),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, ["model=org/tiny", "unset HF_HUB_OFFLINE"]),
        ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot be reached", "network"]),
        ("not a repository", {}, ["model=not a repository", "download failed"]),
    ],
)
def test_download_errors_name_the_remedy(hub, python, model, environment, words):
    done = python(*DOWNLOAD, f"model={model}", **{"HF_ENDPOINT": hub.url, **environment})
    assert done.returncode == 1
    assert done.stderr.startswith("toka-download: error: ")
    assert "Traceback" not in done.stderr
    missing = [word for word in words if word not in done.stderr]
    assert not missing, done.stderr


def test_a_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("my_model") == tmp_path / "my_model"
    assert find_model("./my_model/") == tmp_path / "my_model"
    assert find_tokenizer(str(tmp_path / "my_model")) == tmp_path / "my_model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/my_model") == tmp_path / "my_model"


@each_row("name", ["/no/such/directory", "./missing", "~/missing", "a/b/c"])
def test_a_name_that_is_neither_directory_nor_repository(name):
    with pytest.raises(ModelError, match="no such directory"):
        find_model(name)


def test_a_file_in_place_of_a_directory(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="give the directory"):
        find_model(str(tmp_path / "model.safetensors"))


def test_the_bundled_model_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "MODEL_DIR", tmp_path)
    with pytest.raises(ModelError, match="bundled"):
        find_model(None)
    (tmp_path / "config.json").write_text("{}")
    assert find_model(None) == tmp_path
