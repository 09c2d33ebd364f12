"""Objects in S3, by a server in a process of its own that speaks S3's protocol (moto's)."""

from __future__ import annotations

import asyncio
import re

import pytest
from cartridge_hosts import s3_server
from fetching import failure, fetch, refusal
from rows import check_each

from tokasaurus.cartridges.sources.s3 import S3Source

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(endpoint, monkeypatch, tmp_path):
    """A client of a new bucket, with the environment that the source finds, too."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    for each in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=each["Key"])
    client.delete_bucket(Bucket="bucket")


@pytest.fixture
def asking(tmp_path):
    targets = tmp_path / "targets"
    targets.mkdir()

    def ask(call, cartridge_id, max_bytes=1000):
        return asyncio.run(call(S3Source(max_bytes), cartridge_id, targets))

    return ask


def put(client, key, data):
    client.put_object(Bucket="bucket", Key=key, Body=data)


def test_an_object_and_its_companion_are_fetched(bucket, asking):
    put(bucket, "cartridge.pt", b"data")
    got = asking(fetch, "s3://bucket/cartridge.pt")
    assert (got.data, got.companion, got.num_bytes) == (b"data", None, 4)
    assert got.version == got.found_version
    put(bucket, "runs/1/cartridge.pt", b"run")
    put(bucket, "runs/1/config.yaml", b"model: {}")
    got = asking(fetch, "s3://bucket/runs/1/cartridge.pt")
    assert (got.data, got.companion) == (b"run", b"model: {}")


def test_a_prefix_with_one_cartridge_is_enough(bucket, asking):
    put(bucket, "runs/1/cache-step3.pt", b"3")
    put(bucket, "runs/1/cache-step20.pt", b"20")
    put(bucket, "runs/10/cache-step99.pt", b"99")
    put(bucket, "runs/1/config.yaml", b"model: {}")
    for cartridge_id in ("s3://bucket/runs/1", "s3://bucket/runs/1/"):
        got = asking(fetch, cartridge_id)
        assert (got.data, got.companion) == (b"20", b"model: {}")
    assert asking(fetch, "s3://bucket/").data == b"99"


def test_new_contents_are_another_version(bucket, asking):
    put(bucket, "c.pt", b"1")
    first = asking(fetch, "s3://bucket/c.pt")
    assert asking(fetch, "s3://bucket/c.pt").version == first.version
    put(bucket, "c.pt", b"2")
    assert asking(fetch, "s3://bucket/c.pt").version != first.version


def test_what_is_not_there_is_refused_by_name(bucket, asking):
    put(bucket, "large.pt", bytes(1001))
    put(bucket, "logs/output.log", b"text")

    def check(row):
        cartridge_id, message = row
        assert re.search(message, asking(refusal, cartridge_id))

    rows = [
        ("s3://bucket/c.pt", "there is no s3://bucket/c.pt; check the id"),
        ("s3://nothing/c.pt", "there is no s3://nothing/c.pt"),
        ("s3://nothing/run", "there is no s3://nothing/run/"),
        ("s3://bucket/large.pt", "1001 bytes, and max_cartridge_bytes=1000"),
        ("s3://bucket/logs", "no file there ends in .pt or .safetensors; it has output.log"),
        ("s3://bucket/none", "it has no files"),
        ("bucket/c.pt", "the id must be s3://BUCKET/KEY"),
        ("s3://b/c.pt", "the id must be s3://BUCKET/KEY"),
        ("s3://bucket", "the id must be s3://BUCKET/KEY"),
        ("s3://Bu cket/c.pt", "the id must be s3://BUCKET/KEY"),
    ]
    check_each(rows, check)


def test_without_keys_the_remedy_is_named(bucket, asking, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = asking(refusal, "s3://bucket/c.pt")
    assert "this engine has no keys for S3; set AWS_ACCESS_KEY_ID" in message


def test_a_store_that_cannot_be_reached_is_unavailable(bucket, asking, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "S3 cannot be reached" in asking(failure, "s3://bucket/c.pt")
