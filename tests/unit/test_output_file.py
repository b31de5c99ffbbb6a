"""Whole files: links are followed, and what is no regular file is written to as it stands.

Run with: pytest tests/unit/test_output_file.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minitron_client import InvalidValueError
from minitron_client.output_file import check_output, is_regular, write_whole, writing_whole

pytestmark = pytest.mark.unit


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(Path("there") / "target")
    with target.open() as reader:
        check_output(link, "--json")
        write_whole(link, "new")
        assert reader.read() == "old"  # replaced, not written over
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path / "there") == ["target"]


def test_a_link_to_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    check_output(tmp_path / "link", "--json")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_what_breaks_off_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def broken_off() -> None:
        with writing_whole(tmp_path / "a") as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("through_link", [False, True])
def test_a_pipe_is_written_into(tmp_path: Path, through_link: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    name = tmp_path / "link" if through_link else pipe
    assert not is_regular(name)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    check_output(name, "--json")
    write_whole(name, "text")
    reader.join(10)
    assert read == ["text"]
    assert pipe.is_fifo()


def test_a_reader_that_goes_is_one_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def write() -> None:
        with writing_whole(pipe) as file:
            os.close(reader)
            file.write("x" * 100_000)

    with pytest.raises(InvalidValueError, match="its reader has gone before the end"):
        write()


@pytest.mark.parametrize("name", ["none/a", ".", "plain/a"])
def test_no_file_in_a_folder_that_exists_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(InvalidValueError, match=r"--json .*: expected a file's name in a folder that exists"):
        check_output(tmp_path / name, "--json")
    assert os.listdir(tmp_path) == ["plain"]


def test_what_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InvalidValueError, match="--json .*Too many levels of symbolic links"):
        check_output(tmp_path / "loop", "--json")
    monkeypatch.chdir(tmp_path)  # a socket's name has a short limit
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(InvalidValueError, match="--json .*cannot be opened for writing"):
            check_output(tmp_path / "socket", "--json")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InvalidValueError, match="pipe cannot be opened for writing"):
        check_output(tmp_path / "pipe", "--json")
    with pytest.raises(InvalidValueError, match="the folder .* cannot be written to"):
        check_output(tmp_path / "new", "--json")


@pytest.mark.parametrize(
    ("name", "is_piped"), [("/dev/stdout", False), ("/dev/stdout", True), ("{tmp}/out", False)]
)
def test_this_process_s_own_stdout_is_written_in_turn(tmp_path: Path, name: str, is_piped: bool) -> None:
    code = (
        "import sys; from pathlib import Path; from minitron_client.output_file import *\n"
        "path = Path(sys.argv[1])\n"
        "print('before'); check_output(path, '--json'); write_whole(path, 'text\\n'); print('after')"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, name.format(tmp=tmp_path)]
    if is_piped:
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        with out.open("w") as file:
            subprocess.run(command, stdout=file, check=True)
        printed = out.read_text()
    assert printed.split() == ["before", "text", "after"]
