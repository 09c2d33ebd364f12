"""Files of web servers, of which the operator has named the hosts.

Each URL, that of a redirect too, must have an allowed host. So no request makes the engine call an
address within its own network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import httpx2

from tokasaurus.cartridges.sources.choosing import COMPANION, SUFFIXES
from tokasaurus.cartridges.sources.source import Fetched, Found, SourceErrors
from tokasaurus.cartridges.sources.transfer import Http, UrlCheck, content_length, version_of
from tokasaurus.errors import RequestError

__all__ = ["HttpSource"]

_MAX_COMPANION_BYTES = 1 << 20
_NO_HEAD = (405, 501)


class HttpSource:
    """Finds files by their URLs.

    Args:
        http: the client.
        hosts: that are allowed, in lower case; ``*.NAME`` for all below a name.
        max_bytes: of a file.
    """

    def __init__(self, http: Http, hosts: Sequence[str], max_bytes: int) -> None:
        self._http = http
        self._hosts = tuple(hosts)
        self._max_bytes = max_bytes

    async def find(self, cartridge_id: str) -> Found:
        errors = SourceErrors("http", cartridge_id)
        url = _parse(cartridge_id, errors)
        check = self._check(errors)
        async with self._http.get(
            cartridge_id, errors, check, {}, method="HEAD", fallback=_NO_HEAD
        ) as answer:
            version, num_bytes = version_of(answer), content_length(answer)

        async def fetch(directory: Path) -> Fetched:
            path = directory / f"download{_suffix(url)}"
            fetched = await self._http.save(cartridge_id, path, errors, check, {}, self._max_bytes)
            return Fetched(path, await self._companion(url, directory, errors), fetched)

        return Found(version, num_bytes, fetch)

    async def _companion(
        self, url: httpx2.URL, directory: Path, errors: SourceErrors
    ) -> Path | None:
        if url.query:
            return None  # a URL signed for one file
        path = directory / COMPANION
        try:
            await self._http.save(
                str(url.join(COMPANION)),
                path,
                errors,
                self._check(errors),
                {},
                _MAX_COMPANION_BYTES,
            )
        except RequestError:
            path.unlink(missing_ok=True)
            return None
        return path

    def _check(self, errors: SourceErrors) -> UrlCheck:
        def check(url: httpx2.URL) -> None:
            host = url.host.lower()
            for allowed in self._hosts:
                if host == allowed.strip("[]"):
                    return
                if allowed.startswith("*.") and host.endswith(allowed[1:]):
                    return
            remedy = "add it to cartridge_hosts of the engine, or upload the cartridge"
            raise errors.wrong(f"{host} is not a host that cartridges may come from; {remedy}")

        return check


def _parse(cartridge_id: str, errors: SourceErrors) -> httpx2.URL:
    try:
        url = httpx2.URL(cartridge_id)
    except httpx2.InvalidURL as error:
        raise errors.wrong(f"its URL is malformed: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise errors.wrong("the id must be a URL such as https://host/directory/cartridge.pt")
    if url.userinfo:
        raise errors.wrong("a URL with a user name or password is refused; leave them out")
    return url


def _suffix(url: httpx2.URL) -> str:
    suffix = PurePosixPath(url.path).suffix
    return suffix if suffix in SUFFIXES else ""
