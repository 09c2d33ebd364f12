"""Stand-ins for the hosts of cartridges, which speak as much of their protocols as is asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator

from engine_process import eventually
from file_server import Answer
from ports import held_port

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A stand-in for the Hub with one repository."""

    def __init__(self, server, name="hazyresearch/cartridge-wauoq23f"):
        self.server, self.name = server, name
        self.files = {}
        server.answers.clear()
        server.questions.clear()
        for address in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
            server.answers[address] = lambda question: self.describe()

    def put(self, name, data, is_large=True):
        self.files[name] = (data, is_large)
        path = f"/{self.name}/resolve/{COMMIT}/{name}"
        if is_large:  # other hosts have large files
            self.server.answers[path] = Answer(
                status=302, headers={"Location": f"{self.server.url}/bucket/{name}?signature=s"}
            )
            self.server.answers[f"/bucket/{name}"] = Answer(data)
        else:
            self.server.answers[path] = Answer(data)

    def describe(self):
        siblings = []
        for name, (data, is_large) in self.files.items():
            each = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if is_large:
                digest = hashlib.sha256(data).hexdigest()
                each["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(each)
        return Answer.json(
            {"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": siblings}
        )


class Wandb:
    """A stand-in for W&B, which gives the files of a run two at a time."""

    def __init__(self, server):
        self.server = server
        self.runs = {}
        server.answers.clear()
        server.questions.clear()
        server.answers["/graphql"] = self.query

    def put(self, run, name, data, updated="2025-08-01T00:00:00"):
        path = f"/files/{run}/{name}"
        self.server.answers[path] = Answer(data)
        node = {
            "name": name,
            "url": f"{self.server.url}{path}",
            "sizeBytes": str(len(data)),
            "updatedAt": updated,
            "md5": None,
        }
        self.runs.setdefault(run, {})[name] = node

    def query(self, question):
        asked = json.loads(question.body)
        names = asked["variables"]
        assert question.method == "POST"
        assert "project(name: $project, entityName: $entity)" in asked["query"]
        files = self.runs.get(f"{names['entity']}/{names['project']}/{names['run']}")
        if files is None:
            return Answer.json({"data": {"project": {"run": None}}})
        start = int(names["after"] or 0)
        page = list(files.values())[start : start + 2]
        info = {"endCursor": str(start + 2), "hasNextPage": start + 2 < len(files)}
        edges = [{"node": each} for each in page]
        return Answer.json(
            {"data": {"project": {"run": {"files": {"edges": edges, "pageInfo": info}}}}}
        )


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a server that speaks S3's protocol (moto's), in a process of its own."""
    with held_port() as port:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def listens() -> bool:
            assert server.poll() is None, "the S3 server has ended"
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return True
            return False

        try:
            eventually(listens, "the S3 server listens")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()
