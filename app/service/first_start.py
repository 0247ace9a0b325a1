"""The first snapshot of a process: from the index, from the last good state, or from a folder of artifacts.

An index that is empty on a first start gets the folder's artifacts, approved and live. One that is empty although
this server has a last good state was emptied: the state is served on and an operator decides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from app.engine.folder import ArtifactFolder, list_artifacts
from app.errors import ArtifactError, ManifoldError, UnavailableError
from app.registry.index import Index
from app.registry.last_good import LastGood
from app.registry.store import ArtifactStore
from app.rollout import IndexView, NewVersion
from app.service.hot_swap import Follower
from app.service.loading import Loaded, Loader, artifact_files
from app.service.losses import lacks

logger = logging.getLogger(__name__)

ACTOR = "manifold"


@dataclass(frozen=True, slots=True)
class Beginning:
    view: IndexView
    is_whole: bool  # no: a last good state, with live versions only


def find_beginning(index: Index, last_good: LastGood) -> Beginning | None:
    """What there is to begin with; None for an index that was never filled.

    Raises UnavailableError where neither the index nor a last good state is there.
    """
    saved = last_good.load()
    try:
        view = index.view()
    except UnavailableError as error:
        if saved is None:
            raise UnavailableError(f"{error}; and there is no last good state to start from") from error
        logger.error("%s; starting from the last good state, of generation %d", error, saved.generation)
        return Beginning(saved, is_whole=False)
    if saved is not None and (saved.tasks or saved.keys) and _went_back(saved, view):
        return Beginning(saved, is_whole=False)  # the first look at the index tells what it lost meanwhile
    return Beginning(view, is_whole=True) if view.index_id else None


def _went_back(saved: IndexView, view: IndexView) -> bool:
    return saved.index_id != view.index_id or saved.generation > view.generation or lacks(saved, view)


def live_folders(beginning: Beginning | None, store: ArtifactStore, shipped: Path) -> Iterator[Path]:
    """The artifacts that this process will serve first, as far as they can be had."""
    if beginning is None:
        yield from (folder.path for folder in list_artifacts(shipped))
        return
    for record in beginning.view.tasks.values():
        for number in record.traffic.live if record.traffic is not None else ():
            try:
                yield store.fetch(record.versions[number].digest)
            except ManifoldError:
                continue  # the follower tells it


def begin(follower: Follower, beginning: Beginning | None, index: Index, store: ArtifactStore, shipped: Path) -> None:
    """Gives the follower its first snapshot. Raises SettingsError where the index is new and `shipped` no folder."""
    if beginning is None:
        _Import(follower, store, follower.loader).run(index, shipped)
    else:
        follower.resume(beginning.view, is_whole=beginning.is_whole)
    follower.sync()


@dataclass(slots=True)
class _Import:
    """Artifacts become version n of their tasks. One that cannot be served is left out and the others go in."""

    follower: Follower
    store: ArtifactStore
    loader: Loader
    versions: dict[tuple[str, int], NewVersion] = field(default_factory=dict)

    def run(self, index: Index, root: Path) -> None:
        for folder in list_artifacts(root):
            name = str(folder.path.relative_to(root))
            try:
                self._add(folder)
            except ManifoldError as error:
                self.follower.left_out_at_start[name] = str(error)
                logger.error("artifact %s is left out: %s", folder.path, error)
            except Exception as error:  # one artifact must not keep the others from serving
                self.follower.left_out_at_start[name] = f"reading it failed: {error}"
                logger.exception("artifact %s is left out", folder.path)
        if index.create(ACTOR, list(self.versions.values()), f"first start with the artifacts of {root}"):
            logger.info("the index was empty: %d versions of %s are in it now", len(self.versions), root)

    def _add(self, folder: ArtifactFolder) -> None:
        loaded = self.loader.load(folder.path)
        version = loaded.artifact.version(folder.version)
        if (version.task, version.version) in self.versions or version.task == self.loader.engine.spec.name:
            raise ArtifactError(version.task, [f"another folder has version {version.version} of the same name"])
        new = new_version(self.store, loaded, folder.path, folder.version)
        self.store.fetch(new.digest)  # into the cache, for a start without the store
        self.versions[version.task, version.version] = new
        self.follower.keep(version, loaded.handle)


def new_version(store: ArtifactStore, loaded: Loaded, folder: Path, number: int) -> NewVersion:
    """Puts the artifact into the store. Raises UnavailableError where that cannot be reached."""
    files = artifact_files(loaded.artifact, folder)
    digest = store.put(files)
    assert digest == loaded.digest, "the store and the engine take the same digest of the same files"
    size_bytes = sum(map(len, files.values()))
    return NewVersion(loaded.artifact.manifest["task"], number, digest, loaded.card, size_bytes)
