"""The stores over S3's protocol: a server on loopback, and the package and surroundings that an operator would have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from app.domain import content_digest
from app.errors import ArtifactError, NotFoundError, SettingsError, UnavailableError
from app.registry.prediction_lines import to_line
from app.registry.prediction_parts import PartWriter
from app.registry.prediction_store import PredictionStore
from app.registry.store import ArtifactStore

FILES = {"manifest.json": b'{"task": "spam"}', "adapter_model.safetensors": os.urandom(3 * 2**20), "empty": b""}
DIGEST = content_digest(FILES)
NO_ANSWER = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def _surroundings(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What s3fs reads by itself, and no files of this machine's user."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(endpoint: str) -> Iterator[Any]:
    """Another client of the same server, with an empty bucket named `bucket`."""
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    yield client
    for entry in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=entry["Key"])
    client.delete_bucket(Bucket="bucket")
    client.close()


@pytest.fixture
def store(s3: Any, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore("s3://bucket/manifold", tmp_path / "cache", 10**9)


def key_of(kind: str, content_sha256: str) -> str:
    return f"manifold/{kind}/{content_sha256[:2]}/{content_sha256}"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_one_server_puts_another_fetches(store: ArtifactStore, tmp_path: Path, s3: Any) -> None:
    assert store.put(FILES) == DIGEST
    assert store.put(FILES) == DIGEST
    other = ArtifactStore("s3://bucket/manifold", tmp_path / "other", 10**9)
    assert contents(other.fetch(DIGEST)) == FILES
    keys = {entry["Key"] for entry in s3.list_objects_v2(Bucket="bucket")["Contents"]}
    expected = {key_of("blobs", hashlib.sha256(content).hexdigest()) for content in FILES.values()}
    assert keys == expected | {key_of("trees", DIGEST.removeprefix("sha256:"))}


def test_without_a_folder_the_bucket_is_the_store(s3: Any, tmp_path: Path) -> None:
    store = ArtifactStore("s3://bucket", tmp_path / "cache", 10**9)
    store.put(FILES)
    assert contents(store.fetch(DIGEST)) == FILES


def test_damage_is_told_and_putting_again_repairs_it(store: ArtifactStore, s3: Any) -> None:
    store.put(FILES)
    content = FILES["adapter_model.safetensors"]
    key = key_of("blobs", hashlib.sha256(content).hexdigest())
    for damaged in (content[:-7], bytes([content[0] ^ 1]) + content[1:]):
        s3.put_object(Bucket="bucket", Key=key, Body=damaged)
        with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is damaged in the artifact store s3://"):
            store.fetch(DIGEST)
    store.put(FILES)
    assert contents(store.fetch(DIGEST)) == FILES


def test_what_is_not_there(store: ArtifactStore, s3: Any) -> None:
    absent = "sha256:" + "0" * 64
    with pytest.raises(NotFoundError, match="no artifact"):
        store.fetch(absent)
    store.put(FILES)
    assert store.missing([absent, DIGEST]) == {absent}
    s3.delete_object(Bucket="bucket", Key=key_of("blobs", hashlib.sha256(b"").hexdigest()))
    assert store.missing([absent, DIGEST]) == {absent, DIGEST}
    with pytest.raises(NotFoundError, match="lacks empty"):
        store.fetch(DIGEST)


def test_several_threads_at_once(store: ArtifactStore) -> None:
    artifacts = [{"file": os.urandom(1000)} for _ in range(8)]
    with ThreadPoolExecutor(4) as workers:
        digests = list(workers.map(store.put, artifacts))
        folders = list(workers.map(store.fetch, digests))
    assert [contents(folder) for folder in folders] == artifacts


def test_a_bucket_that_is_not_there_is_not_made(s3: Any, tmp_path: Path) -> None:
    store = ArtifactStore("s3://other-bucket/manifold", tmp_path / "cache", 10**9)
    with pytest.raises(UnavailableError, match="s3://other-bucket/manifold cannot be written: .*bucket does not exist"):
        store.put(FILES)
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["bucket"]


def test_a_server_that_is_gone_is_told_and_the_cache_serves_on(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(FILES)
    store.fetch(DIGEST)
    monkeypatch.setenv("AWS_ENDPOINT_URL", NO_ANSWER)
    S3FileSystem.clear_instance_cache()
    cut_off = ArtifactStore("s3://bucket/manifold", tmp_path / "cache", 10**9)
    assert contents(cut_off.fetch(DIGEST)) == FILES
    absent = "sha256:" + "0" * 64
    for attempt in (lambda: cut_off.put(FILES), lambda: cut_off.fetch(absent), lambda: cut_off.missing([DIGEST])):
        with pytest.raises(UnavailableError, match="the artifact store s3://bucket/manifold cannot be"):
            attempt()


def test_credentials_that_are_missing_are_told(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UnavailableError, match="[Cc]redentials"):
        ArtifactStore("s3://bucket/manifold", tmp_path / "cache", 10**9).put(FILES)


# -- the prediction log ------------------------------------------------------------------------------------------------


def write_part(store: PredictionStore, request_id: str) -> None:
    writer = PartWriter(store.folder, store.server, 10**9, 3600.0)
    writer.append(to_line({"time": "2026-01-09T12:00:00.000000Z", "request_id": request_id, "task": "spam"}))
    writer.end()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_predictions_of_several_servers_lie_in_one_bucket(
    s3: Any, tmp_path: Path, kind: Literal["jsonl", "parquet"]
) -> None:
    stores = [PredictionStore("s3://bucket/predictions", tmp_path / name, kind, 10**9) for name in ("one", "two")]
    for number, store in enumerate(stores):
        write_part(store, f"r-{number}")
        store.tidy()
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket="bucket")["Contents"]]
    assert sorted(key.rpartition(".")[2] for key in keys) == [kind, kind]
    for store in stores:
        assert [len(store.find(f"r-{number}").rows) for number in range(3)] == [1, 1, 0]


def test_the_oldest_predictions_in_a_bucket_go(s3: Any, tmp_path: Path) -> None:
    store = PredictionStore("s3://bucket", tmp_path / "home", "jsonl", 200)
    for number in range(4):
        write_part(store, f"r-{number}")
        store.tidy()
    assert [len(store.find(f"r-{number}").rows) for number in range(4)] == [0, 0, 1, 1]


def test_predictions_wait_for_a_server_that_is_gone(
    s3: Any, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PredictionStore("s3://bucket", tmp_path / "home", "jsonl", 10**9)
    monkeypatch.setenv("AWS_ENDPOINT_URL", NO_ANSWER)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(SettingsError, match="the prediction log s3://bucket cannot be written"):
        PredictionStore("s3://bucket", tmp_path / "home", "jsonl", 10**9)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    S3FileSystem.clear_instance_cache()
    store = PredictionStore("s3://bucket", tmp_path / "home", "jsonl", 10**9)
    write_part(store, "r-1")
    monkeypatch.setattr(store, "_fs", S3FileSystem(endpoint_url=NO_ANSWER, skip_instance_cache=True))
    with pytest.raises(UnavailableError, match="the prediction log s3://bucket cannot be written"):
        store.tidy()
    again = PredictionStore("s3://bucket", tmp_path / "home", "jsonl", 10**9)
    again.tidy()
    assert len(again.find("r-1").rows) == 1
    assert len(s3.list_objects_v2(Bucket="bucket")["Contents"]) == 1


def test_a_bucket_for_predictions_that_is_not_there_is_told_at_once(s3: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="s3://other-bucket/log cannot be written: .*bucket does not exist"):
        PredictionStore("s3://other-bucket/log", tmp_path / "home", "jsonl", 10**9)
