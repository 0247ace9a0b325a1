"""Artifacts come back as they were handed in, or not at all with a sentence that says why."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from app.domain import content_digest
from app.errors import ArtifactError, NotFoundError, SettingsError, UnavailableError
from app.registry.store import ArtifactStore

FILES = {"manifest.json": b'{"task": "spam"}', "adapter_model.safetensors": bytes(range(256)) * 64, "empty": b""}
DIGEST = content_digest(FILES)
LONG_AGO_S = 10_000.0


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the store that tests damage lies."""
    return tmp_path / "artifacts"


@pytest.fixture
def store(tmp_path: Path, place: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{place}", tmp_path / "cache", 10**9)


@pytest.fixture
def memory() -> Iterator[str]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield "memory://shelf"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def blob(place: Path, content: bytes) -> Path:
    name = hashlib.sha256(content).hexdigest()
    return place / "blobs" / name[:2] / name


def tree(place: Path, digest: str) -> Path:
    name = digest.removeprefix("sha256:")
    return place / "trees" / name[:2] / name


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def age(folder: Path, age_s: float) -> None:
    then_s = time.time() - age_s
    os.utime(folder, (then_s, then_s))


def leftovers(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*.partial")]


def test_what_is_put_comes_back(store: ArtifactStore, place: Path, tmp_path: Path) -> None:
    assert store.put(FILES) == DIGEST
    assert contents(store.fetch(DIGEST)) == FILES
    assert not leftovers(place, tmp_path)


def test_what_is_only_read_does_not_fill_the_cache(store: ArtifactStore, place: Path, tmp_path: Path) -> None:
    store.put(FILES)
    assert store.read(DIGEST) == FILES
    assert not list((tmp_path / "cache").iterdir())
    store.fetch(DIGEST)
    shutil.rmtree(place)
    assert store.read(DIGEST) == FILES, "the cache has it"


def test_what_is_read_is_never_what_was_damaged(store: ArtifactStore, place: Path) -> None:
    store.put(FILES)
    (store.fetch(DIGEST) / "manifest.json").write_bytes(b"{}")
    assert store.read(DIGEST) == FILES
    blob(place, FILES["manifest.json"]).write_bytes(b"{}")
    with pytest.raises(ArtifactError, match="manifest.json is damaged"):
        store.read(DIGEST)


def test_the_layout_is_addressed_by_content(store: ArtifactStore, place: Path) -> None:
    store.put(FILES)
    for content in FILES.values():
        assert blob(place, content).read_bytes() == content
    listing = tree(place, DIGEST).read_bytes()
    assert "sha256:" + hashlib.sha256(listing).hexdigest() == DIGEST
    assert len([path for path in place.rglob("*") if path.is_file()]) == len(FILES) + 1


def test_any_protocol_of_fsspec_will_do(memory: str, tmp_path: Path) -> None:
    ArtifactStore(memory, tmp_path / "one", 10**9).put(FILES)
    assert contents(ArtifactStore(memory, tmp_path / "two", 10**9).fetch(DIGEST)) == FILES


def test_a_remote_store_with_real_folders_gets_them_made(tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    store = ArtifactStore(f"dir://shelf::file://{tmp_path}", tmp_path / "cache", 10**9)
    store.put(FILES)
    assert contents(store.fetch(DIGEST)) == FILES


def test_what_artifacts_share_is_stored_once(store: ArtifactStore, place: Path) -> None:
    store.put({"a": b"shared", "b": b"one"})
    store.put({"a": b"shared", "b": b"two"})
    assert len([path for path in (place / "blobs").rglob("*") if path.is_file()]) == 3


def test_putting_again_writes_nothing(store: ArtifactStore, place: Path) -> None:
    store.put(FILES)
    before = {path: path.stat().st_ino for path in place.rglob("*")}
    assert store.put(FILES) == DIGEST
    assert {path: path.stat().st_ino for path in place.rglob("*")} == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"!",
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: b"",
    ],
    ids=["truncated", "longer", "bit-flipped", "emptied"],
)
@pytest.mark.parametrize("of", ["file", "tree"])
def test_damage_in_the_store_is_told_and_putting_again_repairs_it(
    store: ArtifactStore, place: Path, of: str, damage: Callable[[bytes], bytes]
) -> None:
    store.put(FILES)
    path = tree(place, DIGEST) if of == "tree" else blob(place, FILES["manifest.json"])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=r"damaged in the artifact store .*: publish the artifact again") as caught:
        store.fetch(DIGEST)
    assert of == "tree" or "manifest.json" in str(caught.value)
    store.put(FILES)
    assert contents(store.fetch(DIGEST)) == FILES


@pytest.mark.parametrize("damage", ["bit-flipped", "truncated", "lost file", "added file", "folder in it"])
def test_a_damaged_cache_is_noticed_at_the_next_read_and_fetched_again(
    store: ArtifactStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(FILES)
    folder = store.fetch(DIGEST)
    file = folder / "adapter_model.safetensors"
    match damage:
        case "bit-flipped":
            file.write_bytes(b"\x01" + FILES[file.name][1:])
        case "truncated":
            os.truncate(file, 1000)
        case "lost file":
            file.unlink()
        case "added file":
            (folder / "more").write_bytes(b"")
        case "folder in it":
            (folder / "more").mkdir()
    assert contents(store.fetch(DIGEST)) == FILES
    assert "is fetched again" in caplog.text
    assert not leftovers(folder.parent)


def test_a_whole_cache_serves_without_the_store(store: ArtifactStore, place: Path) -> None:
    store.put(FILES)
    store.fetch(DIGEST)
    shutil.rmtree(place)
    assert contents(store.fetch(DIGEST)) == FILES


def test_a_damaged_cache_without_the_store_is_not_served(store: ArtifactStore, place: Path) -> None:
    store.put(FILES)
    os.truncate(store.fetch(DIGEST) / "manifest.json", 3)
    shutil.rmtree(place)
    with pytest.raises(NotFoundError):
        store.fetch(DIGEST)


@pytest.mark.parametrize("digest", [DIGEST, "sha256:../../../etc", "md5:00", "", "sha256:" + "A" * 64])
def test_an_artifact_that_is_not_there(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(NotFoundError, match="no artifact"):
        store.fetch(digest)


def test_an_artifact_with_a_file_gone(store: ArtifactStore, place: Path) -> None:
    store.put(FILES)
    blob(place, FILES["manifest.json"]).unlink()
    with pytest.raises(NotFoundError, match=r"lacks manifest\.json of artifact sha256:.*: publish it again"):
        store.fetch(DIGEST)


def test_what_is_missing_is_found_without_reading_files(store: ArtifactStore, place: Path) -> None:
    absent = "sha256:" + "0" * 64
    store.put(FILES)
    assert store.missing([DIGEST, absent, DIGEST]) == {absent}
    assert store.missing([]) == set()
    blob(place, FILES["manifest.json"]).unlink()
    assert store.missing([DIGEST]) == {DIGEST}
    store.put(FILES)
    tree(place, DIGEST).write_bytes(b"")
    assert store.missing([DIGEST]) == {DIGEST}


@pytest.mark.parametrize("name", ["../manifest.json", "a/b", "/etc/passwd", ".hidden", "..", "", "a b", "a\n", "é"])
def test_names_that_are_not_plain_are_refused(store: ArtifactStore, place: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="no plain file name"):
        store.put({name: b"content", "fine.json": b"{}"})
    assert not place.exists()


def test_an_artifact_has_files(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactError, match="no files"):
        store.put({})


@pytest.mark.parametrize(
    "lines",
    ["../{name}:{sha}\n", "a:{sha}\na:{sha}\n", "b:{sha}\na:{sha}\n", "a:{sha}", "a:../../x\n", "", "\ufffd:{sha}\n"],
)
def test_a_list_of_files_that_somebody_else_wrote_is_refused(
    store: ArtifactStore, place: Path, tmp_path: Path, lines: str
) -> None:
    content = b"content"
    listing = lines.format(name="name", sha=hashlib.sha256(content).hexdigest()).encode()
    digest = "sha256:" + hashlib.sha256(listing).hexdigest()
    write(blob(place, content), content)
    write(tree(place, digest), listing)
    with pytest.raises(ArtifactError, match="not one that Manifold wrote"):
        store.fetch(digest)
    assert not any((tmp_path / "cache").iterdir())


def test_many_put_and_fetch_the_same_at_once(place: Path, tmp_path: Path) -> None:
    stores = [ArtifactStore(f"file://{place}", tmp_path / "cache", 10**9) for _ in range(2)]
    start = threading.Barrier(8)

    def work(index: int) -> dict[str, bytes]:
        start.wait()
        stores[index % 2].put(FILES)
        return contents(stores[index % 2].fetch(DIGEST))

    with ThreadPoolExecutor(8) as workers:
        assert list(workers.map(work, range(8))) == [FILES] * 8
    assert not leftovers(tmp_path)


def test_a_store_that_cannot_be_reached_is_told(tmp_path: Path, place: Path, store: ArtifactStore) -> None:
    place.write_bytes(b"a file where the folder should be")
    attempts: tuple[Callable[[], object], ...] = (
        lambda: store.put(FILES),
        lambda: store.fetch(DIGEST),
        lambda: store.read(DIGEST),
        lambda: store.missing([DIGEST]),
    )
    for attempt in attempts:
        with pytest.raises(UnavailableError, match=f"the artifact store file://{place} cannot be"):
            attempt()


def test_a_cache_that_cannot_be_written_is_told(store: ArtifactStore, tmp_path: Path) -> None:
    store.put(FILES)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(UnavailableError, match="cache .* cannot be written"):
        store.fetch(DIGEST)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("abfs://shelf@account.dfs.core.windows.net", "a package that is missing: Install adlfs"),
        ("gopher://shelf", "no place for artifacts: Protocol not known: gopher"),
    ],
)
def test_a_url_that_cannot_work(url: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(SettingsError, match=sentence):
        ArtifactStore(url, tmp_path / "cache", 10**9)


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(SettingsError, match="cache .* cannot be made"):
        ArtifactStore(f"file://{tmp_path}/artifacts", tmp_path / "cache", 10**9)


def test_passwords_in_urls_are_not_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        ArtifactStore("gopher://user:hunter2@host/shelf", tmp_path / "cache", 10**9)
    assert "hunter2" not in str(caught.value)


# -- trimming ----------------------------------------------------------------------------------------------------------


def cached(tmp_path: Path, sizes: dict[str, int], limit_bytes: int) -> tuple[ArtifactStore, dict[str, Path]]:
    """Artifacts in the cache by name, each used a second after the one before, long ago."""
    store = ArtifactStore(f"file://{tmp_path}/artifacts", tmp_path / "cache", limit_bytes)
    folders = {name: store.fetch(store.put({name: b"x" * size})) for name, size in sizes.items()}
    for position, folder in enumerate(folders.values()):
        age(folder, LONG_AGO_S - position)
    return store, folders


def left(folders: dict[str, Path]) -> set[str]:
    return {name for name, folder in folders.items() if folder.exists()}


def test_the_longest_unused_go_first_until_the_rest_fits(tmp_path: Path) -> None:
    store, folders = cached(tmp_path, {"a": 100, "b": 100, "c": 100, "d": 100}, limit_bytes=250)
    store.trim(())
    assert left(folders) == {"c", "d"}


def test_use_counts_not_age(tmp_path: Path) -> None:
    store, folders = cached(tmp_path, {"a": 100, "b": 100, "c": 100}, limit_bytes=150)
    store.fetch("sha256:" + folders["a"].name)
    age(folders["a"], LONG_AGO_S - 100)
    store.trim(())
    assert left(folders) == {"a"}


def test_what_is_to_be_kept_stays_over_the_limit(tmp_path: Path) -> None:
    store, folders = cached(tmp_path, {"a": 100, "b": 100, "c": 100}, limit_bytes=50)
    store.trim(["sha256:" + folders["b"].name])
    assert left(folders) == {"b"}


def test_what_was_just_used_stays(tmp_path: Path) -> None:
    store, folders = cached(tmp_path, {"a": 100, "b": 100}, limit_bytes=0)
    store.fetch("sha256:" + folders["a"].name)
    store.trim(())
    assert left(folders) == {"a"}


def test_within_the_limit_nothing_goes(tmp_path: Path) -> None:
    store, folders = cached(tmp_path, {"a": 100, "b": 100}, limit_bytes=200)
    store.trim(())
    assert left(folders) == {"a", "b"}


def test_what_a_killed_process_left_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    store, _ = cached(tmp_path, {}, limit_bytes=0)
    abandoned, fresh, foreign = (
        tmp_path / "cache" / name for name in (f".{'a' * 32}.partial", f".{'b' * 32}.partial", "x")
    )
    for folder in (abandoned, fresh, foreign):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    age(abandoned, LONG_AGO_S)
    age(foreign, LONG_AGO_S)
    store.trim(())
    assert [folder.exists() for folder in (abandoned, fresh, foreign)] == [False, True, True]


def test_what_was_trimmed_is_fetched_again(tmp_path: Path) -> None:
    store, folders = cached(tmp_path, {"a": 100}, limit_bytes=0)
    store.trim(())
    assert left(folders) == set()
    assert contents(store.fetch("sha256:" + folders["a"].name)) == {"a": b"x" * 100}
