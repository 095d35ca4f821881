"""The training set of a run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest

from fastuft.data import Manifest, list_images


def test_source_images_that_are_target_images_are_left_out(manifest):
    folder = os.path.dirname(manifest.paths[0])
    root = os.path.dirname(folder)
    joined = Manifest.build(folder, root, fraction=1.0)
    assert (joined.num_target, joined.num_source) == (20, 30) and len(set(joined.paths)) == 50
    with pytest.raises(ValueError, match="has only target images"):
        Manifest.build(folder, folder)


def test_the_replayed_share_is_fixed_by_its_seed_and_saved(folders, tmp_path):
    first, again, other = (Manifest.build(*folders, fraction=0.3, seed=s) for s in (1, 1, 2))
    assert first == again and first.paths != other.paths
    assert (first.num_target, first.num_source, first.source_total) == (41, 27, 90)
    assert first.is_source.sum() == 27 and not first.is_source[:41].any()
    first.save(tmp_path / "manifest.json")
    saved = json.loads((tmp_path / "manifest.json").read_text())
    assert saved == {**first.summary(), "paths": list(first.paths)}


def test_the_content_hash_does_not_depend_on_the_location(folders, tmp_path):
    """Under another root, behind a link, or from a replay cache, a run resumes with the same data."""
    first = Manifest.build(*folders, fraction=0.3)
    shutil.copytree(folders[0], tmp_path / "moved")
    (tmp_path / "linked").symlink_to(folders[1])
    elsewhere = [str(tmp_path / "moved"), str(tmp_path / "linked")]
    moved = Manifest.build(*elsewhere, fraction=0.3)
    cached = Manifest.build(*elsewhere, fraction=0.3, replay_cache=str(tmp_path / "cache"))
    assert len({first.content_hash, moved.content_hash, cached.content_hash}) == 1
    assert not set(first.paths) & set(moved.paths)
    (tmp_path / "moved" / "class0" / "000.jpg").write_bytes(b"of another size")
    assert Manifest.build(*elsewhere, fraction=0.3).content_hash != first.content_hash
    renamed = next((tmp_path / "moved").rglob("*.png"))
    renamed.rename(renamed.with_name("900.png"))
    assert Manifest.build(str(tmp_path / "moved")).content_hash != Manifest.build(folders[0]).content_hash


def test_the_content_hash_of_a_list_does_not_depend_on_its_location(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "moved")
    hashes = []
    for root in (folders[0], str(tmp_path / "moved")):
        listed = tmp_path / f"{len(hashes)}.txt"
        listed.write_text("\n".join(list_images(root)[:7]))
        hashes.append(Manifest.build(str(listed)).content_hash)
    assert hashes[0] == hashes[1]


def test_target_images_behind_a_link_are_left_out_of_the_source(manifest, tmp_path):
    folder = os.path.dirname(manifest.paths[0])
    (tmp_path / "link").symlink_to(os.path.dirname(folder))
    joined = Manifest.build(folder, str(tmp_path / "link"), fraction=1.0)
    assert (joined.num_target, joined.num_source) == (20, 30)


def test_names_are_digested_and_written_some_at_a_time(folders, tmp_path, monkeypatch):
    """The digest is that of the lines ``role/name<tab>size``, and the file that of one JSON text, however they are cut."""
    for at_once in (7, 1 << 14):
        monkeypatch.setattr("fastuft.data.manifest._AT_ONCE", at_once)
        built = Manifest.build(*folders, fraction=0.3)
        lines = [
            f"{role}/{os.path.relpath(path, folder)}\t{os.path.getsize(path)}\n"
            for role, folder, paths in zip(
                ("target", "source"), folders, (built.paths[:41], built.paths[41:]), strict=True
            )
            for path in paths
        ]
        assert built.content_hash == hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()
        built.save(tmp_path / "manifest.json")
        expected = json.dumps({**built.summary(), "paths": list(built.paths)})
        assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == expected
