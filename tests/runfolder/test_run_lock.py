"""The lock on a run folder: one holder, named in the errors of others, released with its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from fastuft.runfolder import FolderInUseError, FolderLostError, RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from fastuft.runfolder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path / "run"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_refused_with_the_name_of_the_holder(tmp_path, holder):
    with pytest.raises(
        FolderInUseError, match=rf"process {holder.pid} on '{os.uname().nodename}', since '20\d\d-"
    ) as told:
        RunFolder(tmp_path / "run").lock().__enter__()
    assert "wait for it to end, stop it, or choose another folder" in str(told.value)


def test_a_killed_holder_releases_the_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    with RunFolder(tmp_path / "run").lock():
        found = json.loads((tmp_path / "run" / "run.lock").read_text())
        assert found["pid"] == os.getpid()


def test_a_symbolic_link_is_the_same_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with (
        RunFolder(tmp_path / "run").lock(),
        pytest.raises(FolderInUseError, match="another run of this process"),
        RunFolder(tmp_path / "link").lock(),
    ):
        pass


def test_children_do_not_inherit_the_lock(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with folder.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_unused_folder_is_removed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        assert folder.path.is_dir()
    assert not folder.path.exists()
    with folder.lock():
        folder.summary_file.write_text("{}")
    assert os.listdir(folder.path) == ["summary.json"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_file_locks_the_run_continues_with_one_warning(tmp_path, monkeypatch, recwarn, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with RunFolder(tmp_path / "run").lock() as lock:
        lock.check()
    assert len(recwarn) == 1 and "is on a file system without locks" in str(recwarn[0].message)


def test_a_removed_or_replaced_folder_is_detected(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock() as lock:
        lock.check()
        folder.path.rename(tmp_path / "elsewhere")
        with pytest.raises(FolderLostError, match="was removed or replaced while the run worked in it"):
            lock.check()
        folder.path.mkdir()
        with pytest.raises(FolderLostError, match="was removed or replaced"):
            lock.check()
