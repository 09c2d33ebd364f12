"""Runs at Weights & Biases: the files that a training has saved there.

W&B answers GraphQL. One query lists a run's files with their URLs; that is all that is needed of
its client, which would bring 20 MB and a process of its own.
"""

from __future__ import annotations

import base64
import netrc
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from tokasaurus.cartridges.sources.choosing import COMPANION, choose_file, companion_of
from tokasaurus.cartridges.sources.source import Fetched, Found, SourceErrors
from tokasaurus.cartridges.sources.transfer import Http, any_url

__all__ = ["WandbSource"]

DEFAULT_ENTITY, DEFAULT_PROJECT = "hazy-research", "cartridges"

_BASE_URL = "https://api.wandb.ai"
_PART = r"[A-Za-z0-9_.-]+"
_ID = re.compile(rf"(?P<run>{_PART}(/{_PART}){{0,2}})(:(?P<file>.+))?")
_MAX_PAGES = 100
_MAX_COMPANION_BYTES = 1 << 20
_QUERY = """
query Files($entity: String!, $project: String!, $run: String!, $after: String) {
  project(name: $project, entityName: $entity) {
    run(name: $run) {
      files(first: 200, after: $after) {
        edges { node { name url sizeBytes updatedAt md5 } }
        pageInfo { endCursor hasNextPage }
      }
    }
  }
}
"""


@dataclass(frozen=True)
class _RunFile:
    """A file of a run."""

    url: str
    num_bytes: int | None
    version: str


class WandbSource:
    """Finds runs: ``RUN``, ``ENTITY/RUN`` or ``ENTITY/PROJECT/RUN``, and ``:FILE`` behind each.

    Args:
        http: the client.
        max_bytes: of a file.
    """

    def __init__(self, http: Http, max_bytes: int) -> None:
        self._http = http
        self._max_bytes = max_bytes

    async def find(self, cartridge_id: str) -> Found:
        errors = SourceErrors("wandb", cartridge_id)
        parsed = _ID.fullmatch(cartridge_id)
        if parsed is None:
            raise errors.wrong(
                "the id must be RUN, ENTITY/RUN or ENTITY/PROJECT/RUN, with :FILE for one of"
                " several files"
            )
        entity, project, run = _full_name(parsed["run"])
        name, wanted = f"{entity}/{project}/{run}", parsed["file"]
        files = await self._files(entity, project, run, errors)
        if wanted is None:
            remedy = f"name one of them: {name}:FILE"
            wanted = choose_file(files, errors, remedy)
        elif wanted not in files:
            raise errors.wrong(f"the run {name} has no file {wanted!r}; check the id")
        chosen, companion = files[wanted], companion_of(wanted, files) or companion_of("", files)

        async def fetch(directory: Path) -> Fetched:
            path = directory / f"download{PurePosixPath(wanted).suffix}"
            await self._save(chosen, path, self._max_bytes, errors)
            config = None
            if companion is not None:
                config = directory / COMPANION
                await self._save(files[companion], config, _MAX_COMPANION_BYTES, errors)
            return Fetched(path, config, chosen.version)

        return Found(chosen.version, chosen.num_bytes, fetch)

    async def _save(self, file: _RunFile, path: Path, max_bytes: int, errors: SourceErrors) -> None:
        # A file's URL may be one of a bucket, which gets no key of W&B.
        is_own = urlsplit(file.url).netloc == urlsplit(_base_url()).netloc
        headers = _key_header() if is_own else {}
        await self._http.save(file.url, path, errors, any_url, headers, max_bytes)

    async def _files(
        self, entity: str, project: str, run: str, errors: SourceErrors
    ) -> dict[str, _RunFile]:
        """All files of a run by name."""
        files: dict[str, _RunFile] = {}
        after = None
        for _ in range(_MAX_PAGES):
            variables = {"entity": entity, "project": project, "run": run, "after": after}
            answer = await self._http.json(
                f"{_base_url()}/graphql",
                errors,
                {"query": _QUERY, "variables": variables},
                _key_header(),
            )
            found = _run_of(answer)
            if found is None:
                key = "" if _key() else ", and set WANDB_API_KEY for the engine, which has no key"
                raise errors.wrong(
                    f"there is no run {entity}/{project}/{run} at {_base_url()}, or it does not"
                    f" show it to this engine; check the id{key}"
                )
            try:
                page = found["files"]
                for edge in page["edges"]:
                    files.setdefault(str(edge["node"]["name"]), _file(edge["node"]))
                if not page["pageInfo"]["hasNextPage"]:
                    return files
                after = page["pageInfo"]["endCursor"]
            except (KeyError, TypeError, ValueError):
                raise errors.unavailable("its list of files has another form than known") from None
        return files


def _full_name(run: str) -> tuple[str, str, str]:
    parts = run.split("/")
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    if len(parts) == 2:
        return parts[0], DEFAULT_PROJECT, parts[1]
    return DEFAULT_ENTITY, DEFAULT_PROJECT, parts[0]


def _run_of(answer: Any) -> Any:
    """The run in an answer; None if there is none."""
    for key in ("data", "project", "run"):
        answer = answer.get(key) if isinstance(answer, dict) else None
    return answer


def _file(node: dict[str, Any]) -> _RunFile:
    size = node.get("sizeBytes")
    stamps = (node.get("md5"), node.get("updatedAt"), size)
    version = " ".join(str(each) for each in stamps) if any(stamps[:2]) else ""
    return _RunFile(str(node["url"]), None if size is None else int(size), version)


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL", _BASE_URL).rstrip("/")


def _key() -> str | None:
    """The key of the environment, or the one that ``wandb login`` has left."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc.netrc().authenticators(urlsplit(_base_url()).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def _key_header() -> dict[str, str]:
    key = _key()
    if not key:
        return {}
    pair = base64.b64encode(f"api:{key}".encode()).decode()
    return {"Authorization": f"Basic {pair}"}
