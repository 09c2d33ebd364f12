"""The page at ``/``: files of this package, which a browser gets as they are.

The files hold nothing secret, so they need no key; what they show does. The policy that goes with
them allows nothing but the engine itself: no script in the text of a page, no other host, no frame.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request, Response

__all__ = ["PAGE_PATHS", "POLICY", "PageRoutes"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for"
    " 'script'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered with 304
}
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_FILES = (
    "index.html",
    "document.html",
    "style.css",
    "icon.svg",
    "main.js",
    "elements.js",
    "engine.js",
    "charts.js",
    "now.js",
    "future.js",
    "requests.js",
    "trial.js",
    "document.js",
)
_PATHS = {
    "/": "index.html",
    "/docs": "document.html",
    **{f"/page/{name}": name for name in _FILES if not name.endswith(".html")},
}
PAGE_PATHS = frozenset(_PATHS)
"""Paths that need no key."""


class PageRoutes:
    """The routes."""

    def __init__(self) -> None:
        directory = resources.files("tokasaurus.server") / "page"
        self._contents = {name: (directory / name).read_bytes() for name in _FILES}
        self._tags = {
            name: f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            for name, content in self._contents.items()
        }

    def router(self) -> APIRouter:
        router = APIRouter()
        for path in _PATHS:
            router.add_api_route(path, self.file, methods=["GET", "HEAD"], include_in_schema=False)
        return router

    async def file(self, request: Request) -> Response:
        """A file of the page."""
        name = _PATHS[request.url.path]
        headers = {**_HEADERS, "ETag": self._tags[name]}
        if request.headers.get("if-none-match") == self._tags[name]:
            return Response(status_code=304, headers=headers)
        kind = _TYPES[name.rpartition(".")[2]]
        return Response(self._contents[name], headers=headers, media_type=kind)
