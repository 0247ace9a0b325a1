"""Where artifacts lie: a content-addressed store behind an fsspec URL, with a cache of folders on local disk.

Everything read is hashed and compared with its name. Knows nothing of tasks, versions or what the files hold.

Layout below the URL: `blobs/<hh>/<sha256>` is a file's content, `trees/<hh>/<sha256>` an artifact: the lines
`name:sha256` of its files. `<hh>` is the first byte. An artifact's digest is the sha256 of its lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from app.domain import PLAIN_NAME, content_digest, content_listing
from app.errors import ArtifactError, NotFoundError, SettingsError, UnavailableError
from app.registry.durable import write_durably
from app.registry.places import open_place, reaching, without_user

logger = logging.getLogger("manifold")

_ALGORITHM = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial")
_RECENT_S = 60.0  # a folder used this recently may be open in another process
_ABANDONED_S = 3600.0  # a partial folder this old belongs to a process that was killed
_LOOKUPS = 16  # at once, where many artifacts are looked for


class ArtifactStore:
    """Safe from several threads, and from several processes that share the store and the cache."""

    def __init__(self, url: str, cache: Path, cache_limit_bytes: int) -> None:
        """Raises SettingsError where the URL or the cache cannot work. Does not reach for the store yet.

        Credentials and endpoints are what the protocol's own package reads from its surroundings.
        """
        self.url, self._secret_url = without_user(url), url
        self._fs, self._root = open_place(url, "artifacts")
        self._cache = cache
        self._cache_limit_bytes = cache_limit_bytes
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"the artifact cache {cache} cannot be made: {error.strerror or error}") from error

    def put(self, files: Mapping[str, bytes]) -> str:
        """Stores an artifact and returns its digest; one that is there already is made whole where it is damaged.

        Raises ArtifactError for names that are not plain, UnavailableError where the store cannot be written.
        """
        _check_names(files)
        listing = content_listing(files).encode()
        with self._reaching("written"):
            for content in files.values():
                self._put("blobs", content)
            self._put("trees", listing)  # last: whoever finds it finds its files
        return content_digest(files)

    def fetch(self, digest: str) -> Path:
        """A local folder with the artifact's files, which others read too: not to be changed.

        Raises NotFoundError where the store lacks it, ArtifactError where what it has is damaged, UnavailableError
        where it, or the cache, cannot be reached.
        """
        folder = self._cache / self._hex(digest)
        if not self._is_cached(folder, digest):
            files = self._download(digest)
            self._keep(folder, digest, files)
        return folder

    def read(self, digest: str) -> dict[str, bytes]:
        """The artifact's files by name, as they were put. Raises as `fetch` does, and puts nothing into the cache."""
        files = self._read_cached(self._cache / self._hex(digest), digest)
        return files if files is not None else self._download(digest)

    def missing(self, digests: Iterable[str]) -> set[str]:
        """Those that the store cannot give: not there, or not all of it. Reads trees, not files."""
        distinct = list(dict.fromkeys(digests))
        with ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="store") as workers:
            found = list(workers.map(self._is_whole, distinct))
        return {digest for digest, is_there in zip(distinct, found, strict=True) if not is_there}

    def trim(self, keep: Collection[str]) -> None:
        """Drops cached artifacts, those not used for longest first, until the rest is within the limit.

        Never those in `keep`, nor those used within the last minute.
        """
        kept = {digest.removeprefix(_ALGORITHM) for digest in keep}
        now_s = time.time()
        folders = sorted(_cached(self._cache), key=lambda folder: folder.used_s)
        excess_bytes = sum(folder.size_bytes for folder in folders) - self._cache_limit_bytes
        for folder in folders:
            unused_s = now_s - folder.used_s
            if folder.is_partial:
                is_due = unused_s > _ABANDONED_S
            else:
                is_due = excess_bytes > 0 and unused_s > _RECENT_S and folder.path.name not in kept
            if is_due:
                _drop(folder.path)
                excess_bytes -= folder.size_bytes

    # -- the store -----------------------------------------------------------------------------------------------------

    def _put(self, kind: str, content: bytes) -> None:
        path = self._path(kind, hashlib.sha256(content).hexdigest())
        try:
            if self._fs.cat_file(path) == content:
                return
        except (FileNotFoundError, PermissionError):  # S3 says the second to those who may write but not list
            pass
        if isinstance(self._fs, LocalFileSystem):
            write_durably(Path(path), content)
        else:
            self._pipe(path, content)

    def _pipe(self, path: str, content: bytes) -> None:
        try:
            self._fs.pipe_file(path, content)
        except FileNotFoundError:  # of stores with real folders; the root is the operator's to make
            parent = path.rpartition("/")[0]
            for folder in (parent.rpartition("/")[0], parent):
                with contextlib.suppress(FileExistsError):
                    self._fs.mkdir(folder, create_parents=False)
            self._fs.pipe_file(path, content)

    def _download(self, digest: str) -> dict[str, bytes]:
        entries = self._tree(digest)
        return {name: self._blob(digest, name, sha256) for name, sha256 in entries.items()}

    def _tree(self, digest: str) -> dict[str, str]:
        """sha256 by file name."""
        content = self._read("trees", self._hex(digest))
        if content is None:
            raise NotFoundError(f"the artifact store {self.url} has no artifact {digest}: publish it again")
        if _ALGORITHM + hashlib.sha256(content).hexdigest() != digest:
            raise self._damaged(digest, "its list of files")
        return _parse_tree(digest, content)

    def _blob(self, digest: str, name: str, sha256: str) -> bytes:
        content = self._read("blobs", sha256)
        if content is None:
            raise NotFoundError(f"the artifact store {self.url} lacks {name} of artifact {digest}: publish it again")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise self._damaged(digest, name)
        return content

    def _is_whole(self, digest: str) -> bool:
        try:
            entries = self._tree(digest)
        except (NotFoundError, ArtifactError):
            return False
        with self._reaching("read"):
            return all(self._fs.exists(self._path("blobs", sha256)) for sha256 in entries.values())

    def _read(self, kind: str, sha256: str) -> bytes | None:
        with self._reaching("read"):
            try:
                content: bytes = self._fs.cat_file(self._path(kind, sha256))
                return content
            except FileNotFoundError:
                return None

    def _path(self, kind: str, sha256: str) -> str:
        return f"{self._root}/{kind}/{sha256[:2]}/{sha256}"

    def _hex(self, digest: str) -> str:
        if _DIGEST.fullmatch(digest) is None:
            raise NotFoundError(f"there is no artifact {digest!r}: a digest is sha256: and 64 hexadecimal digits")
        return digest.removeprefix(_ALGORITHM)

    def _damaged(self, digest: str, what: str) -> ArtifactError:
        fault = f"{what} is damaged in the artifact store {self.url}: publish the artifact again to repair it"
        return ArtifactError(digest, [fault])

    def _reaching(self, done: str) -> AbstractContextManager[None]:
        return reaching(f"the artifact store {self.url}", done, self._secret_url)

    # -- the cache -----------------------------------------------------------------------------------------------------

    def _is_cached(self, folder: Path, digest: str) -> bool:
        return self._read_cached(folder, digest) is not None

    def _read_cached(self, folder: Path, digest: str) -> dict[str, bytes] | None:
        """The files of a folder that is there and whole; a damaged one is dropped."""
        try:
            os.utime(folder)  # first: from here on `trim` leaves it alone
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            if content_digest(files) == digest:
                return files
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("the cached artifact %s cannot be read (%s) and is fetched again", folder, error)
        else:
            logger.warning("the cached artifact %s is damaged and is fetched again", folder)
        _drop(folder)
        return None

    def _keep(self, folder: Path, digest: str, files: Mapping[str, bytes]) -> None:
        partial = _aside(folder)
        try:
            partial.mkdir()
            for name, content in files.items():
                (partial / name).write_bytes(content)
            with contextlib.suppress(OSError):  # of a folder that another process put there meanwhile
                partial.rename(folder)
            if not self._is_cached(folder, digest):
                raise UnavailableError(
                    f"the artifact cache {self._cache} does not keep what is written: check its disk"
                )
        except OSError as error:
            message = f"the artifact cache {self._cache} cannot be written: {error.strerror or error}"
            raise UnavailableError(message) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Cached:
    path: Path
    is_partial: bool
    size_bytes: int
    used_s: float  # seconds since the epoch


def _cached(cache: Path) -> Iterator[_Cached]:
    """What this module put there, and nothing else that may lie there."""
    for path in cache.iterdir():
        is_partial = _PARTIAL.fullmatch(path.name) is not None
        if not is_partial and _SHA256.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError):  # dropped by another process meanwhile
            size_bytes = sum(file.stat().st_size for file in path.iterdir())
            yield _Cached(path, is_partial, size_bytes, path.stat().st_mtime)


def _drop(folder: Path) -> None:
    """Out of sight in one step, so that nobody finds half of it."""
    with contextlib.suppress(OSError):
        aside = _aside(folder)
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{uuid.uuid4().hex}.partial")


def _check_names(files: Mapping[str, bytes]) -> None:
    faults = [
        f"{name!r} is no plain file name: use letters, digits, dots, dashes and underscores, no folders"
        for name in sorted(files)
        if PLAIN_NAME.fullmatch(name) is None
    ]
    if not files:
        faults.append("it has no files")
    if faults:
        raise ArtifactError("to be stored", faults)


def _parse_tree(digest: str, content: bytes) -> dict[str, str]:
    """The hash was right, so this is what somebody wrote: it may still not be ours."""
    lines = content.decode("utf-8", "replace").splitlines()
    entries = {name: sha256 for name, _, sha256 in (line.partition(":") for line in lines)}
    is_plain = all(PLAIN_NAME.fullmatch(name) and _SHA256.fullmatch(sha256) for name, sha256 in entries.items())
    canonical = "".join(f"{name}:{sha256}\n" for name, sha256 in sorted(entries.items()))
    if not entries or not is_plain or canonical.encode() != content:
        raise ArtifactError(digest, ["its list of files in the artifact store is not one that Manifold wrote"])
    return entries
