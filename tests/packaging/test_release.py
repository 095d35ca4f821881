"""The release script refuses incomplete releases; builds are reproducible."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_builds import checkout, pip

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit of this checkout's files and a finished section in the changelog."""
    copy = checkout(tmp_path)
    log = copy / "CHANGELOG.md"
    log.write_text(log.read_text().replace("## [Unreleased]", f"## [Unreleased]\n\n## [{VERSION}] - 2026-01-02"))
    git(copy, "init", "--quiet")
    git(copy, "add", "--all")
    git(copy, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "All")
    return copy


def git(folder, *arguments):
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def release(folder, version=VERSION):
    """(status, error text) of the script, with a Python that fails at once if a build starts."""
    environment = {**os.environ, "PYTHON": "/bin/false"}
    done = subprocess.run([folder / ".ci" / "release", version], capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


def test_a_dirty_tree_is_refused(repository):
    (repository / "new.txt").write_text("left over")
    status, error = release(repository)
    assert status == 1 and "the working tree has changes" in error


def test_a_mismatched_version_is_refused(repository):
    status, error = release(repository, "9.9.9")
    assert status == 1 and 'pyproject.toml does not say version = "9.9.9"' in error


def test_an_existing_tag_is_refused(repository):
    git(repository, "tag", f"v{VERSION}")
    status, error = release(repository)
    assert status == 1 and f"the tag v{VERSION} exists already" in error


def test_a_version_missing_from_the_changelog_is_refused(repository):
    git(repository, "rm", "--quiet", "CHANGELOG.md")
    git(repository, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "Without")
    status, error = release(repository)
    assert status == 1 and "CHANGELOG.md has no section" in error


def test_a_clean_tree_is_built(repository):
    status, error = release(repository)
    assert status == 1 and "release:" not in error  # /bin/false replaces the build


@pytest.mark.slow
def test_builds_are_reproducible(tmp_path):
    """In folders with paths of different length, with the CUDA part if nvcc is available."""
    wheels = []
    for name in ("one", "another"):
        copy = checkout(tmp_path / name)
        done = pip(
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-w",
            str(tmp_path / name),
            str(copy),
            SOURCE_DATE_EPOCH="1767312000",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        wheels.append(next((tmp_path / name).glob("*.whl")).read_bytes())
    assert wheels[0] == wheels[1], sys.platform
