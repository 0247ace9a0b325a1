"""Windows on disk: a restarted server has them again, and a damaged file is told and put aside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.errors import UnavailableError
from app.registry.saved_windows import SavedWindows, claimed_windows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "drift-windows"


def rows(count: int) -> np.ndarray:
    return np.arange(3 * count, dtype=np.uint8).reshape(count, 3)


def test_what_was_saved_is_loaded(file: Path) -> None:
    SavedWindows(file).save({"sha256:a": rows(1)})
    SavedWindows(file).save({"sha256:a": rows(4), "sha256:b": rows(2)[::-1]})
    loaded = SavedWindows(file).load()
    assert loaded["sha256:a"].tolist() == rows(4).tolist() and loaded["sha256:b"].tolist() == rows(2)[::-1].tolist()
    assert os.listdir(file.parent) == [file.name]


def test_where_there_is_none_it_begins_with_none(file: Path) -> None:
    assert SavedWindows(file).load() == {}
    SavedWindows(file).save({})
    assert SavedWindows(file).load() == {}


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "future"])
def test_a_damaged_file_is_told_and_kept_aside(file: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    SavedWindows(file).save({"sha256:a": rows(4)})
    content = file.read_bytes()
    damaged = {
        "cut": content[:-3],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
        "other": b"[1]\n",
        "future": content.replace(b'"schema_version":1', b'"schema_version":2'),
    }
    file.write_bytes(damaged[damage])
    assert SavedWindows(file).load() == {}
    assert "are not used and kept as drift-windows.damaged" in caplog.text
    assert (file.parent / "drift-windows.damaged").read_bytes() == damaged[damage] and not file.exists()


def test_a_disk_that_takes_nothing_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SavedWindows(file).save({"sha256:a": rows(4)})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match="No space left"):
        SavedWindows(file).save({"sha256:a": rows(5)})
    assert len(SavedWindows(file).load()["sha256:a"]) == 4


# -- several servers of one home ---------------------------------------------------------------------------------------

SERVER = """
import sys
from pathlib import Path
import numpy as np
from app.registry.saved_windows import claimed_windows
with claimed_windows(Path(sys.argv[1]) / "drift-windows") as windows:
    windows.save({"sha256:a": np.full((2, 3), 9, np.uint8)})
    print("saved", flush=True)
    sys.stdin.read()
"""


def test_of_servers_that_share_a_home_each_keeps_its_own(tmp_path: Path) -> None:
    with claimed_windows(tmp_path / "drift-windows") as first:
        first.save({"sha256:a": rows(4)})
        command = [sys.executable, "-c", SERVER, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None and other.stdout.readline() == b"saved\n"
            with claimed_windows(tmp_path / "drift-windows") as third:
                assert third.load() == {}
            other.kill()  # without a word
        assert first.load()["sha256:a"].tolist() == rows(4).tolist()
        with claimed_windows(tmp_path / "drift-windows") as again:
            assert again.load()["sha256:a"].tolist() == [[9] * 3] * 2
    with claimed_windows(tmp_path / "drift-windows") as alone:
        assert alone.load()["sha256:a"].tolist() == rows(4).tolist()


def test_a_home_that_cannot_be_locked_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "drift-windows.lock").mkdir()
    with claimed_windows(tmp_path / "drift-windows") as windows:
        windows.save({"sha256:a": rows(4)})
    assert "overwrite each other's" in caplog.text
    assert len(SavedWindows(tmp_path / "drift-windows").load()["sha256:a"]) == 4
