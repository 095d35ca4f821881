"""Extracts the needed share of a source in tar shards, as class folders of plain files."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fastuft.atomic import write_whole
from fastuft.data import IMAGE_SUFFIXES
from fastuft.names import safe_name
from fastuft.randomness import keyed_generator


@contextmanager
def _opened(tar: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(tar) as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar} is not a readable tar file ({error}); copy it again") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    assert content is not None  # only called for regular files
    return content.read()


def _images(tar: Path) -> list[tuple[str, str]]:
    """(member, class) of every image in a shard.

    The class is the shard's name or, if the shard has ``.cls`` files (WebDataset), the content of the one beside the image.
    """
    names: dict[str, None] = {}  # a member that is added again replaces the earlier one
    classes: dict[str, str] = {}
    with _opened(tar) as archive:
        for member in archive:
            if not member.isfile():
                continue
            suffix = PurePosixPath(member.name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                names[member.name] = None
            elif suffix == ".cls":
                classes[member.name[: -len(suffix)]] = _content(archive, member).decode("utf-8", "replace").strip()
    if not classes:
        return [(name, safe_name(tar.stem)) for name in names]
    found = [(name, classes.get(name[: -len(PurePosixPath(name).suffix)], "")) for name in names]
    for name, label in found:
        if not re.fullmatch(r"\w[\w-]*", label) or safe_name(label) != label:
            raise ValueError(
                f"{tar}: {name} has the class {label!r}; in a shard with .cls files, each image needs one with a number "
                "or a name of letters, digits, _ and -"
            )
    return found


def extract_tar_sample(shards: str | Path, folder: str | Path, *, fraction: float, seed: int) -> str:
    """Extract a fixed random share of a source in tar shards, as class folders below ``folder``.

    Images of all shards (``*.tar``) are drawn once with ``seed``, so only the needed share is ever unpacked. A shard's name is
    the class of its images, unless there are ``.cls`` files beside them (WebDataset). A finished sample is reused.

    Args:
        shards: folder of tar files.
        folder: folder to write to.
        fraction: share of all images, in (0, 1].
        seed: seed of the draw, recorded beside the files.

    Raises:
        ValueError: there are no shards or no images in them, a shard is damaged, or ``folder`` has another sample.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r} is out of range; allowed: (0, 1]")
    tars = sorted(Path(shards).glob("*.tar"))
    if not tars:
        raise ValueError(f"{shards} has no .tar shards; name a folder of tar files")
    folder = Path(folder)
    stamp_file = folder / "sample.json"
    request = {"shards": [tar.name for tar in tars], "fraction": fraction, "seed": seed}
    if stamp_file.exists():
        stamp = json.loads(stamp_file.read_text(encoding="utf-8"))
        if stamp["request"] != request:
            raise ValueError(f"{folder} has another sample of a source; remove it, or choose another folder")
        if stamp["finished"]:
            return str(folder)
    members = [(shard, *image) for shard, tar in enumerate(tars) for image in _images(tar)]
    if not members:
        raise ValueError(f"the shards in {shards} have no images; expected files ending in {' '.join(IMAGE_SUFFIXES)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(stamp_file, json.dumps({"request": request, "finished": False}).encode())
    keep = max(1, round(len(members) * fraction))
    chosen = keyed_generator(seed, "tar sample").permutation(len(members))[:keep]
    wanted: dict[int, dict[str, str]] = {}
    for index in chosen:
        shard, name, label = members[index]
        wanted.setdefault(shard, {})[name] = label
    for shard, labels in sorted(wanted.items()):
        with _opened(tars[shard]) as archive:
            for member in archive:
                if member.isfile() and member.name in labels:
                    class_folder = folder / labels[member.name]
                    class_folder.mkdir(parents=True, exist_ok=True)
                    # The name combines shard and path, so that images of one class from several shards stay distinct.
                    file = class_folder / safe_name(f"{tars[shard].stem}/{member.name}")
                    write_whole(file, _content(archive, member), flush=False)
    write_whole(stamp_file, json.dumps({"request": request, "finished": True}).encode())
    return str(folder)
