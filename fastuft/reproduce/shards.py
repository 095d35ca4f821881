"""A source set that is kept in tar files: the share that is needed, as class folders of plain files."""

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
    assert content is not None  # only regular files are asked for
    return content.read()


def _images(tar: Path) -> list[tuple[str, str]]:
    """(member, class) of every image of a shard.

    The class is the shard's name, or what the ``.cls`` file beside the image says, where a shard has such files
    (WebDataset).
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
                f"{tar}: {name} has {label!r} as class; where a shard holds .cls files, each image needs one with a "
                "number or a name of letters, digits, _ and -"
            )
    return found


def extract_tar_sample(shards: str | Path, place: str | Path, *, fraction: float, seed: int) -> str:
    """The fixed random share of a source set that is kept in tar shards, as class folders below ``place``.

    Images of all shards (``*.tar``) are drawn once by ``seed``, so only the share that is needed is ever unpacked. A
    shard's name is its images' class, unless ``.cls`` files stand beside them (WebDataset). A finished sample is reused.

    Args:
        shards: folder of tar files.
        place: folder to write to.
        fraction: share of all images, in (0, 1].
        seed: seed of the draw, recorded beside the files.

    Raises:
        ValueError: no shards, a damaged one, no images in them, or a ``place`` with another sample.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r} is out of range; allowed: (0, 1]")
    tars = sorted(Path(shards).glob("*.tar"))
    if not tars:
        raise ValueError(f"{shards} holds no .tar shards; name a folder of tar files")
    place = Path(place)
    stamp_file = place / "sample.json"
    request = {"shards": [tar.name for tar in tars], "fraction": fraction, "seed": seed}
    if stamp_file.exists():
        stamp = json.loads(stamp_file.read_text(encoding="utf-8"))
        if stamp["request"] != request:
            raise ValueError(f"{place} holds another sample of a source set; remove it, or choose another folder")
        if stamp["finished"]:
            return str(place)
    members = [(shard, *image) for shard, tar in enumerate(tars) for image in _images(tar)]
    if not members:
        raise ValueError(
            f"the shards of {shards} hold no images; expected are files ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    place.mkdir(parents=True, exist_ok=True)
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
                    folder = place / labels[member.name]
                    folder.mkdir(parents=True, exist_ok=True)
                    # One name of shard and path, so that images of one class from several shards stay apart.
                    write_whole(
                        folder / safe_name(f"{tars[shard].stem}/{member.name}"), _content(archive, member), flush=False
                    )
    write_whole(stamp_file, json.dumps({"request": request, "finished": True}).encode())
    return str(place)
