"""An engine without the extra s3."""

from __future__ import annotations

import asyncio
import sys

from fetching import refusal

from tokasaurus.cartridges.sources.s3 import S3Source


def test_without_boto3_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    message = asyncio.run(refusal(S3Source(1000), "s3://bucket/c.pt", tmp_path))
    assert "pip install 'tokasaurus[s3]'" in message
