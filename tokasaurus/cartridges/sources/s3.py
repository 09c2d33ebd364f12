"""Objects in S3 and in stores that speak its protocol.

boto3 finds keys, regions and endpoints as everywhere (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION,
AWS_ENDPOINT_URL, roles of machines). It is an extra, and is imported with the first request.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tokasaurus.cartridges.sources.choosing import (
    COMPANION,
    SUFFIXES,
    choose_file,
)
from tokasaurus.cartridges.sources.source import Fetched, Found, SourceErrors
from tokasaurus.cartridges.sources.transfer import PIECE_BYTES, PieceWriter
from tokasaurus.errors import RequestError

__all__ = ["S3Source"]

_ID = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<key>.*)", re.DOTALL)
_MAX_COMPANION_BYTES = 1 << 20
_MAX_OBJECTS = 10_000  # that are looked at below a prefix
_CONNECT_S, _IDLE_S, _NUM_TRIES = 10, 30, 3
_MISSING = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
_REFUSED = (
    *("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("ExpiredToken", "InvalidToken"),
)


class S3Source:
    """Finds objects: ``s3://BUCKET/KEY.pt``, or ``s3://BUCKET/PREFIX/`` with one in it.

    Args:
        max_bytes: of a file.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._client: Any = None
        self._creating = asyncio.Lock()

    async def find(self, cartridge_id: str) -> Found:
        errors = SourceErrors("s3", cartridge_id)
        parsed = _ID.fullmatch(cartridge_id)
        if parsed is None:
            raise errors.wrong("the id must be s3://BUCKET/KEY, such as s3://bucket/cartridge.pt")
        client = await self._get_client(errors)
        bucket, key = parsed["bucket"], parsed["key"]
        if not key.endswith(SUFFIXES):
            key = await asyncio.to_thread(_choose, client, bucket, key, errors)
        head = await asyncio.to_thread(_head, client, bucket, key, errors)
        num_bytes = int(head["ContentLength"])
        beside = str(PurePosixPath(key).with_name(COMPANION))

        async def fetch(directory: Path) -> Fetched:
            path = directory / f"download{PurePosixPath(key).suffix}"
            version = await _save(client, bucket, key, path, errors, self._max_bytes)
            companion: Path | None = directory / COMPANION
            try:
                await _save(
                    client, bucket, beside, directory / COMPANION, errors, _MAX_COMPANION_BYTES
                )
            except RequestError:
                (directory / COMPANION).unlink(missing_ok=True)
                companion = None
            return Fetched(path, companion, version)

        return Found(_version(head), num_bytes, fetch)

    async def _get_client(self, errors: SourceErrors) -> Any:
        async with self._creating:
            if self._client is None:
                self._client = await asyncio.to_thread(_make_client, errors)
        return self._client


def _make_client(errors: SourceErrors) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise errors.wrong(
            "this engine cannot read S3; its operator can install what that needs with"
            " pip install 'tokasaurus[s3]'"
        ) from None
    with _s3_errors(errors, "the client"):
        return boto3.session.Session().client(
            "s3",
            config=Config(
                connect_timeout=_CONNECT_S,
                read_timeout=_IDLE_S,
                retries={"max_attempts": _NUM_TRIES, "mode": "standard"},
            ),
        )


def _head(client: Any, bucket: str, key: str, errors: SourceErrors) -> Any:
    with _s3_errors(errors, f"s3://{bucket}/{key}"):
        return client.head_object(Bucket=bucket, Key=key)


def _choose(client: Any, bucket: str, prefix: str, errors: SourceErrors) -> str:
    """The key of the cartridge below a prefix."""
    prefix = prefix.strip("/")
    prefix = f"{prefix}/" if prefix else ""
    with _s3_errors(errors, f"s3://{bucket}/{prefix}"):
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=prefix, PaginationConfig={"MaxItems": _MAX_OBJECTS}
        )
        names = [each["Key"][len(prefix) :] for page in pages for each in page.get("Contents", ())]
    return prefix + choose_file(names, errors, "name one of them with its whole key")


async def _save(
    client: Any, bucket: str, key: str, path: Path, errors: SourceErrors, max_bytes: int
) -> str:
    """Downloads an object, and returns its version."""
    with _s3_errors(errors, f"s3://{bucket}/{key}"):
        answer = await asyncio.to_thread(client.get_object, Bucket=bucket, Key=key)
        body = answer["Body"]
        try:
            with PieceWriter(path, errors, max_bytes, int(answer["ContentLength"])) as writer:
                while piece := await asyncio.to_thread(body.read, PIECE_BYTES):
                    await writer.write(piece)
        finally:
            body.close()
    return _version(answer)


def _version(answer: Any) -> str:
    return f"{answer.get('ETag', '')} {answer.get('VersionId', '')} {answer['LastModified']}"


@contextlib.contextmanager
def _s3_errors(errors: SourceErrors, wanted: str) -> Iterator[None]:
    """Turns the errors of boto3 into ours."""
    from botocore import exceptions

    try:
        yield
    except RequestError:  # a ValueError, too
        raise
    except exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _MISSING:
            raise errors.wrong(f"there is no {wanted}; check the id") from None
        if code in _REFUSED:
            raise errors.wrong(
                f"S3 does not show {wanted} to this engine ({code}); check the id, and the engine's"
                " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or its profile or role"
            ) from None
        raise errors.unavailable(f"S3 fails ({code}); try again later") from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        raise errors.wrong(
            "this engine has no keys for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for"
            " it, or AWS_PROFILE"
        ) from None
    except (exceptions.BotoCoreError, ValueError) as error:
        raise errors.unavailable(
            f"S3 cannot be reached, or ends the connection: {type(error).__name__}; try again"
            " later, or check the network and AWS_ENDPOINT_URL of the engine"
        ) from None
