"""Atomic writes: concurrent writers, killed writers, disk errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from fastuft import atomic
from fastuft.atomic import remove_leftovers, whole_file, write_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from fastuft.atomic import whole_file
with whole_file(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.read()
"""


def writer(path, end):
    command = [sys.executable, "-c", KILLED, str(path), end]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def partials(folder):
    return [path.name for path in folder.glob("*.partial")]


@pytest.mark.parametrize("flush", [True, False])
def test_a_write_replaces_the_old_file_atomically(tmp_path, flush):
    path = tmp_path / "figures.json"
    write_whole(path, b"old", flush=flush)
    with whole_file(path, flush=flush) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old" and partial.parent == path.parent
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["figures.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_keeps_the_old_file_and_leaves_no_partial(tmp_path, error):
    path = tmp_path / "figures.json"
    write_whole(path, b"old")
    with pytest.raises(error), whole_file(path) as partial:
        partial.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["figures.json"]


def test_a_disk_error_keeps_the_old_file_and_leaves_no_partial(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_whole(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["figures.json"]


def test_concurrent_writers_leave_one_whole_file(tmp_path):
    path = tmp_path / "shared.bin"
    contents = [bytes([number]) * 100_000 for number in range(4)]

    def write(content):
        for _ in range(20):
            write_whole(path, content, flush=False)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    assert path.read_bytes() in contents and os.listdir(tmp_path) == ["shared.bin"]


def test_leftovers_of_dead_writers_are_removed_and_of_live_ones_kept(tmp_path):
    path = tmp_path / "weights.bin"
    with writer(path, "kill") as killed:
        killed.wait()
    assert len(partials(tmp_path)) == 1 and not path.exists()
    with writer(path, "wait") as living:
        assert living.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        assert len(partials(tmp_path)) == 1
        living.stdin.close()
        living.wait()
    assert path.read_bytes() == b"half" and not partials(tmp_path)


def test_leftovers_of_unknown_writers_are_kept_for_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_process_space", lambda: "0123abcd")
    with pytest.raises(OSError, match="gone"), whole_file(tmp_path / "weights.bin") as partial:
        monkeypatch.setattr(type(partial), "unlink", lambda *_, **__: None)
        partial.write_bytes(b"half")
        raise OSError("gone")
    monkeypatch.undo()
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is not the file system's
    remove_leftovers(tmp_path)
    monkeypatch.undo()
    assert partials(tmp_path)
    yesterday = time.time() - 25 * 3600
    os.utime(partial, (yesterday, yesterday))
    remove_leftovers(tmp_path)
    assert not partials(tmp_path)


def test_files_of_other_programs_are_left_alone(tmp_path):
    (tmp_path / "download.partial").write_bytes(b"theirs")
    remove_leftovers(tmp_path)
    assert partials(tmp_path) == ["download.partial"]


def test_the_longest_names_can_be_written(tmp_path):
    path = tmp_path / ("ä" * 125 + ".json")  # 255 bytes
    write_whole(path, b"{}")
    assert path.read_bytes() == b"{}"
