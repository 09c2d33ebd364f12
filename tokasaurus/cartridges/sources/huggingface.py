"""Repositories of the Hugging Face Hub: one file and its config.yaml, and nothing else of them.

The Hub's client finds the repository, and obeys its environment variables (HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). The file is downloaded without it: it has no limit of bytes, and cannot be stopped.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tokasaurus.cartridges.sources.choosing import COMPANION, choose_file, companion_of
from tokasaurus.cartridges.sources.source import Fetched, Found, SourceErrors
from tokasaurus.cartridges.sources.transfer import Http, any_url

__all__ = ["HuggingFaceSource"]

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>[\w./-]+?))?(:(?P<file>.+))?")
_LOOK_S = 30.0
_MAX_COMPANION_BYTES = 1 << 20


class _Chosen(NamedTuple):
    """What is downloaded of one commit of a repository."""

    repository: str
    commit: str
    file: str
    companion: str | None
    version: str
    num_bytes: int | None


class HuggingFaceSource:
    """Finds repositories: ``OWNER/NAME``, or ``OWNER/NAME@REVISION:FILE``.

    Args:
        http: the client.
        max_bytes: of a file.
        endpoint: of the Hub; None for the one that the environment names.
    """

    def __init__(self, http: Http, max_bytes: int, endpoint: str | None = None) -> None:
        self._http = http
        self._max_bytes = max_bytes
        self._endpoint = endpoint

    async def find(self, cartridge_id: str) -> Found:
        errors = SourceErrors("huggingface", cartridge_id)
        parsed = _ID.fullmatch(cartridge_id)
        if parsed is None:
            raise errors.wrong(
                "the id must be a repository such as owner/name, with @REVISION for a branch, tag"
                " or commit, and :FILE for one of several files"
            )
        chosen = await asyncio.to_thread(self._choose, parsed, errors)

        async def fetch(directory: Path) -> Fetched:
            path = directory / f"download{PurePosixPath(chosen.file).suffix}"
            await self._save(chosen, chosen.file, path, self._max_bytes, errors)
            companion = None
            if chosen.companion is not None:
                companion = directory / COMPANION
                await self._save(chosen, chosen.companion, companion, _MAX_COMPANION_BYTES, errors)
            return Fetched(path, companion, chosen.version)

        return Found(chosen.version, chosen.num_bytes, fetch)

    async def _save(
        self, chosen: _Chosen, name: str, path: Path, max_bytes: int, errors: SourceErrors
    ) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(chosen.repository, name, revision=chosen.commit, endpoint=self._endpoint)
        headers = build_hf_headers(library_name="tokasaurus")
        await self._http.save(url, path, errors, any_url, headers, max_bytes)

    def _choose(self, parsed: re.Match[str], errors: SourceErrors) -> _Chosen:
        """Asks the Hub; blocks. Raises RequestError or SourceUnavailable."""
        repository, revision, wanted = parsed["repository"], parsed["revision"], parsed["file"]
        found = self._ask(repository, revision, errors)
        files = {each.rfilename: each for each in found.siblings or ()}
        if wanted is None:
            wanted = choose_file(files, errors, f"name one of them: {repository}:FILE")
        elif wanted not in files:
            raise errors.wrong(f"the repository {repository} has no file {wanted!r}; check the id")
        companion = companion_of(wanted, files)
        version = "+".join(_content_id(files[name]) for name in (wanted, companion) if name)
        return _Chosen(
            repository, found.sha, wanted, companion, f"{wanted}:{version}", files[wanted].size
        )

    def _ask(self, repository: str, revision: str | None, errors: SourceErrors) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub import errors as hub

        api = HfApi(endpoint=self._endpoint)
        missing = (
            f"there is no repository {repository} at {api.endpoint}; check the id, and if it is"
            " private, set HF_TOKEN for the engine"
        )
        try:
            return api.repo_info(
                repository, revision=revision, files_metadata=True, timeout=_LOOK_S
            )
        except hub.GatedRepoError:
            raise errors.wrong(
                f"the repository {repository} is gated: ask for access at"
                f" {api.endpoint}/{repository}, then set HF_TOKEN for the engine"
            ) from None
        except hub.RepositoryNotFoundError:
            raise errors.wrong(missing) from None
        except hub.RevisionNotFoundError:
            raise errors.wrong(
                f"the repository {repository} has no branch, tag or commit {revision!r}; check the"
                " id"
            ) from None
        except hub.HFValidationError as error:
            raise errors.wrong(f"{error}; the id must be a repository such as owner/name") from None
        except hub.OfflineModeIsEnabled:
            raise errors.unavailable("HF_HUB_OFFLINE is set for the engine; unset it") from None
        except hub.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status == 404:  # of a server that does not say what is missing
                raise errors.wrong(missing) from None
            if status in (401, 403):
                raise errors.wrong(
                    f"{api.endpoint} does not show it to this engine (status {status}); set"
                    " HF_TOKEN for the engine"
                ) from None
            raise errors.unavailable(
                f"{api.endpoint} fails (status {status}); try again later"
            ) from None
        except Exception as error:  # whatever the client's HTTP library raises
            raise errors.unavailable(
                f"{api.endpoint} cannot be reached: {type(error).__name__}; try again later, or"
                " check the network"
            ) from None


def _content_id(file: Any) -> str:
    """What the Hub identifies a file's contents by."""
    return str(file.lfs.sha256 if file.lfs is not None else file.blob_id)
