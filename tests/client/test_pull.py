"""What comes back from a server, and what is never written."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.client.http import Server
from app.client.pull import pull_live
from app.domain import content_digest
from tests.client.conftest import Done, Run, write_folder
from tests.client.recorded import answering

FILES = {"manifest.json": b"{}", "adapter_model.safetensors": b"tensors"}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_folder_is_what_was_published(run: Run, folder: Path, second: str, tmp_path: Path) -> None:
    done = run("pull", second, "--out", str(tmp_path / "new" / "spam"))
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"spam@2 is in {tmp_path / 'new' / 'spam'} (") and ", 0.2 kB)\n" in done.out
    assert f"next: manifold publish {tmp_path / 'new' / 'spam'} --url URL" in done.out
    published = contents(folder)
    del published["report.html"]
    assert contents(tmp_path / "new" / "spam") == published
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["spam"]


def test_without_a_version_it_is_the_champion(run: Run, folder: Path, second: str, tmp_path: Path) -> None:
    run("promote", second)
    done = run("pull", "spam", "--out", str(tmp_path / "champion"), "--json")
    assert (done.answer["version"], done.answer["arm"]) == (2, "champion")
    assert (tmp_path / "champion" / "manifest.json").is_file()


def test_a_task_that_is_not_live_has_no_champion(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spam" / "manifest.json").write_text(
        (tmp_path / "spam" / "manifest.json").read_text().replace('"task": "spam"', '"task": "ham"')
    )
    run("publish", str(folder))
    done = run("pull", "ham", "--out", str(tmp_path / "out"))
    assert (done.status, done.err) == (1, "manifold: no version of ham is live: name one, as in ham@1\n")
    assert run("pull", "ham@1", "--out", str(tmp_path / "out")).status == 0


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [("spam@9", "task spam has no version 9"), ("eggs", 'there is no task "eggs"'), ("eggs@1", "there is no task")],
)
def test_what_is_not_there_is_the_servers_sentence(run: Run, tmp_path: Path, wanted: str, sentence: str) -> None:
    done = run("pull", wanted, "--out", str(tmp_path / "out"))
    assert done.status == 1 and sentence in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wanted", ["spam@x", "spam@", "@2"])
def test_a_version_that_is_none_is_a_wrong_call(wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["pull", wanted, "--out", "out"])
    assert stopped.value.code == 2
    assert "is not a version like spam@3" in capsys.readouterr().err


def test_of_the_tasks_that_are_asked_for_the_live_ones_are_pulled(
    run: Run, url: str, second: str, tmp_path: Path
) -> None:
    run("promote", second)
    run("publish", str(write_folder(tmp_path / "candidate", "candidate")))
    champions = pull_live(Server(url), ["spam", "candidate", "new"], tmp_path / "live")
    assert champions["spam"] == 2 and champions["intent"] == 2 and "candidate" not in champions
    assert [path.name for path in (tmp_path / "live").iterdir()] == ["spam"]


# -- the folder --------------------------------------------------------------------------------------------------------


def test_an_empty_folder_is_taken_and_any_other_is_left_alone(
    run: Run, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    assert "is where you are" in run("pull", second, "--out", ".").err
    assert run("pull", second, "--out", str(out)).status == 2
    monkeypatch.chdir(tmp_path)
    assert run("pull", second, "--out", "out").status == 0
    before = contents(out)
    done = run("pull", "spam@1", "--out", "out")
    assert (done.status, done.err) == (2, "manifold: out exists and is not empty: name a new folder with --out\n")
    assert contents(out) == before
    assert "exists and is not empty" in run("pull", second, "--out", "out/manifest.json").err


def test_what_cannot_be_written_is_one_sentence(run: Run, second: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("pull", second, "--out", str(tmp_path / "file" / "out"))
    assert done.status == 1 and "cannot be written: Not a directory" in done.err and done.err.count("\n") == 1


# -- what a server should not send -------------------------------------------------------------------------------------

Receive = Callable[[bytes], Done]


@pytest.fixture
def receive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Receive:
    """Pulls from a server that says one thing of the version and sends another."""
    record: dict[str, Any] = {"task": "spam", "version": 2, "digest": content_digest(FILES), "size_bytes": 9}
    path = "GET /v1/tasks/spam/versions/2"

    def pull(content: bytes) -> Done:
        with answering({path: [(200, record)], f"{path}/artifact": [(200, content)]}) as server:
            status = main(["pull", "spam@2", "--out", str(tmp_path / "place" / "out"), "--url", server.url])
        return Done(status, *capsys.readouterr())

    return pull


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return written.getvalue()


def plain(**changed: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(tarfile.TarInfo(name), content) for name, content in {**FILES, **changed}.items()]


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def sparse() -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo("sparse")
    member.pax_headers = {"GNU.sparse.size": "1000000000000", "GNU.sparse.map": "0,0"}
    return member, b""


def test_what_arrives_whole_is_written(receive: Receive, tmp_path: Path) -> None:
    assert receive(tar_of(*plain())).status == 0
    assert contents(tmp_path / "place" / "out") == FILES


def test_other_files_than_the_server_says_are_not_written(receive: Receive, tmp_path: Path) -> None:
    done = receive(tar_of(*plain(**{"manifest.json": b"{!"})))
    assert done.status == 1 and done.out == ""
    assert done.err.startswith("manifold: spam@2 did not arrive as it is: its digest is ")
    assert "nothing was written, so try again" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize(
    "member",
    [
        pytest.param((tarfile.TarInfo("../up"), b"x"), id="path up"),
        pytest.param((tarfile.TarInfo("/etc/root"), b"x"), id="root"),
        pytest.param((tarfile.TarInfo("folder/file"), b"x"), id="folder"),
        pytest.param((tarfile.TarInfo("a\\b"), b"x"), id="backslash"),
        pytest.param((tarfile.TarInfo(".bashrc"), b"x"), id="hidden"),
        pytest.param((tarfile.TarInfo(".."), b"x"), id="dots"),
        pytest.param((tarfile.TarInfo("x" * 129), b"x"), id="long"),
        pytest.param((tarfile.TarInfo("manifest.json"), b"x"), id="twice"),
        pytest.param(special("folder", tarfile.DIRTYPE), id="a folder"),
        pytest.param(special("link", tarfile.SYMTYPE, "/etc/passwd"), id="symbolic link"),
        pytest.param(special("hard", tarfile.LNKTYPE, "manifest.json"), id="hard link"),
        pytest.param(special("pipe", tarfile.FIFOTYPE), id="pipe"),
        pytest.param(special("device", tarfile.CHRTYPE), id="device"),
        pytest.param(sparse(), id="sparse"),
    ],
)
def test_no_path_and_no_special_file_is_taken(
    receive: Receive, tmp_path: Path, member: tuple[tarfile.TarInfo, bytes]
) -> None:
    done = receive(tar_of(*plain(), member))
    assert done.status == 1
    assert "which is no file with a plain name of its own; nothing was written" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "place").exists() and not (tmp_path / "up").exists()


def huge() -> bytes:
    member = tarfile.TarInfo("manifest.json")
    member.size = 2**70
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>" * 200, tar_of(*plain())[:700], huge()],
    ids=["nothing", "a page", "half", "huge"],
)
def test_what_is_no_archive_is_one_sentence(receive: Receive, tmp_path: Path, content: bytes) -> None:
    done = receive(content)
    assert done.status == 1 and "what came for spam@2 is no archive (" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "place").exists()
