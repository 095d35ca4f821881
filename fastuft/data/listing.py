"""Finding image files: in folders of any depth, in list files, or one by one."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastuft.atomic import write_whole
from fastuft.data.caches import cache_folder
from fastuft.data.files import Files
from fastuft.data.images import Images, ImageSource, labels_of_images
from fastuft.data.left_out import IMAGE_SUFFIXES, IsImage, LeftOut, checked_suffixes, image_names, is_junk
from fastuft.data.list_files import LIST_SUFFIXES, read_list
from fastuft.data.reading import in_threads
from fastuft.data.sources import PACKED_SUFFIXES, Found, is_url_or_packed, open_location, packed_in
from fastuft.messages import note
from fastuft.names import printable

_SCAN_CACHE_FROM = 20_000  # smaller folders are scanned each time
_SCANNERS = min(32, 4 * (os.cpu_count() or 1))  # threads that wait for the file system


@dataclass
class _Scan:
    """The contents of a folder."""

    files: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)  # and the modification time of each
    left_out: LeftOut = field(default_factory=LeftOut)


def find_images(paths: str | Sequence[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Images:
    """All images in folders (at any depth), list files, single files, shards and URLs.

    Hidden entries and folders that systems leave behind (``__MACOSX``, ``@eaDir``) are skipped. Files of other suffixes
    are left out, and one line gives their number. A list file (.txt, .csv, .tsv, .lst) names one image per line,
    relative to itself; see :func:`fastuft.data.list_files.read_list`. A folder of shards without image files stands
    for its shards; see :func:`fastuft.data.sources.open_location`.

    Args:
        paths: one or several locations. Duplicates are kept once.
        suffixes: suffixes of images in folders and shards, in any case; "" stands for names without one.

    Raises:
        ValueError: a path does not exist, a location has no images, a folder cannot be read, a line of a list does not
            name an image, a shard is damaged, or a suffix does not begin with a dot.
    """
    wanted = checked_suffixes(suffixes)
    seen: set[str] = set()
    sources: list[ImageSource] = []
    for path in map(os.fspath, [paths] if isinstance(paths, str | os.PathLike) else paths):
        found = open_location(path, wanted, seen) if is_url_or_packed(path) else _local(path, wanted, seen)
        found.left_out.report(found.shown, len(found))
        sources += found.sources
        if not len(found) and not found.twice:
            raise ValueError(
                f"'{printable(found.shown)}' has no images; expected files ending in {' '.join(wanted)} at any depth, "
                "or shards of them (.tar, .parquet, .arrow)"
            )
    return Images.of(sources)


def _local(path: str, wanted: tuple[str, ...], seen: set[str]) -> Found:
    """The images of a folder, a list file, or a single file."""
    root = os.path.abspath(os.path.expanduser(path))
    found = Found(root)
    if os.path.isdir(root):
        scan = _scan_cached(root, wanted)
        files, base = scan.files, root
        if not files and any(suffix in PACKED_SUFFIXES for suffix in scan.left_out.others):
            return open_location(root, wanted, seen)
        found.left_out = scan.left_out
    elif os.path.splitext(root)[1].lower() in LIST_SUFFIXES and os.path.lexists(root):
        files = read_list(root, image_names(wanted), lambda folder: _scan_folder(folder, wanted).files)
        base = _common_folder(files)
    elif os.path.lexists(root):
        files, base = [root], os.path.dirname(root)
    else:
        raise ValueError(
            f"'{printable(path)}' does not exist; name a folder of images, an image, or a list file "
            f"({', '.join(LIST_SUFFIXES)})"
        )
    skip = len(base.rstrip(os.sep)) + 1
    new = [file for file in dict.fromkeys(files) if file not in seen]
    found.twice = len(new) < len(files)
    seen |= set(new)
    found.sources.append(Files(new, [file[skip:] for file in new]))
    return found


def list_images(paths: str | Sequence[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Sequence[str]:
    """What :func:`find_images` finds, sorted within each location; a list of absolute paths if all are local files."""
    found = find_images(paths, suffixes)
    return list(found) if found.only_files else found


def labeled_folder(path: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> tuple[Sequence[str], list[int], list[str]]:
    """The images in class folders; images beside these folders are left out, and one line says so.

    An image that links reach from several classes belongs to the first, as in :func:`find_images`. In shards, classes
    are the members' folders or the content of ``.cls`` files.

    Returns:
        (paths, labels, class names): classes are the sorted sub-folders, with the images inside them at any depth.

    Raises:
        ValueError: there are no class folders, or a class folder has no images.
    """
    if is_url_or_packed(path):
        return _packed_labels(path, find_images(path, suffixes))
    root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise ValueError(f"'{printable(path)}' is not a folder; labels need one sub-folder per class")
    inner = _read_folder(root, image_names(checked_suffixes(suffixes)))[0]
    names = sorted(os.path.basename(folder) for folder, _ in inner)
    found = find_images(root, suffixes) if names or packed_in(root) else None
    if found is not None and not found.only_files:
        return _packed_labels(path, found)
    if found is None or not names:
        raise ValueError(f"'{printable(path)}' has no class folders; labels need one sub-folder per class")
    of_class: dict[str, list[str]] = {name: [] for name in names}
    for file, name in zip(found, found.names(), strict=True):
        first, inside, _ = name.partition(os.sep)
        if inside:
            of_class[first].append(file)
    if empty := [name for name in names if not of_class[name]]:
        raise ValueError(
            f"'{printable(os.path.join(root, empty[0]))}' has no images of its own (expected files ending in "
            f"{' '.join(suffixes)}); each sub-folder of '{printable(path)}' is a class, so remove those without images"
        )
    paths = [file for name in names for file in of_class[name]]
    if beside := len(found) - len(paths):
        note(f"'{printable(root)}': {beside} images beside the class folders are left out")
    labels = [label for label, name in enumerate(names) for _ in of_class[name]]
    return paths, labels, names


def _packed_labels(path: str, images: Images) -> tuple[Sequence[str], list[int], list[str]]:
    found = labels_of_images(images)
    if found is None:
        raise ValueError(
            f"the images of '{printable(path)}' have no classes; pack them with one folder per class, or with .cls files"
        )
    return images, found[0].tolist(), found[1]


def _common_folder(files: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""


def _read_folder(folder: str, is_image: IsImage) -> tuple[list[tuple[str, bool]], list[str], LeftOut]:
    """([(sub-folder, whether it is a link)], image files, what is left out) of one folder."""
    inner: list[tuple[str, bool]] = []
    found: list[str] = []
    others = LeftOut()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_junk(entry.name) and _is_folder(entry):
                    others.junk[entry.name] += 1
                elif entry.name.startswith("."):
                    continue
                elif _is_folder(entry):
                    inner.append((entry.path, entry.is_symlink()))
                elif is_image(entry.name):
                    found.append(entry.path)
                else:
                    others.others[os.path.splitext(entry.name)[1].lower()] += 1
    except OSError as error:
        raise ValueError(
            f"the folder '{printable(folder)}' cannot be read ({error.strerror or error}); fix its permissions, or move it "
            "away from the images"
        ) from error
    return inner, found, others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _scan_folder(root: str, suffixes: tuple[str, ...]) -> _Scan:
    """Scan everything below ``root`` with several threads.

    Links are followed; a folder with several paths is read once.
    """
    scan = _Scan()
    is_image = image_names(suffixes)

    def read(folder: str) -> tuple[list[tuple[str, bool]], list[str], LeftOut, int]:
        modified = os.stat(folder).st_mtime_ns  # before reading, so that a file added meanwhile invalidates the cache
        return *_read_folder(folder, is_image), modified

    level = [(root, os.path.realpath(root))]
    seen = {level[0][1]}
    while level:
        following: list[tuple[str, str]] = []
        read_level = in_threads(read, [folder for folder, _ in level], _SCANNERS, chunk=8)
        for (folder, real), (inner, found, others, modified) in zip(level, read_level, strict=True):
            scan.files += found
            scan.folders[folder] = modified
            scan.left_out.add(others)
            for candidate, is_link in sorted(inner):
                where = os.path.realpath(candidate) if is_link else os.path.join(real, os.path.basename(candidate))
                if where not in seen:
                    seen.add(where)
                    following.append((candidate, where))
        level = following
    scan.files.sort()
    return scan


def _cache_file(root: str, suffixes: tuple[str, ...]) -> Path | None:
    """The file that caches a scan; None if the user has no home folder."""
    folder = cache_folder()
    if folder is None:
        return None
    key = hashlib.blake2b(os.fsencode("\0".join([root, *suffixes])), digest_size=12).hexdigest()
    return folder / f"scan-{key}.json"


def _scan_cached(root: str, suffixes: tuple[str, ...]) -> _Scan:
    """Like ``_scan_folder``, but a large tree is scanned again only if one of its folders has changed."""
    cache = _cache_file(root, suffixes)
    if cache is not None:
        try:
            known = json.loads(cache.read_text(encoding="utf-8"))
            left_out = LeftOut(Counter(known["left_out"]), Counter(known["junk"]))
            scan = _Scan(known["files"], known["folders"], left_out)
            if known["root"] == root and all(os.stat(f).st_mtime_ns == m for f, m in scan.folders.items()):
                return scan
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no cache, an unreadable one, or a folder that no longer exists: scan
    scan = _scan_folder(root, suffixes)
    if cache is not None and len(scan.files) >= _SCAN_CACHE_FROM:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            content = {"root": root, "files": scan.files, "folders": scan.folders}
            content |= {"left_out": scan.left_out.others, "junk": scan.left_out.junk}
            write_whole(cache, json.dumps(content).encode(), flush=False)
        except OSError:
            pass  # the cache only saves time
    return scan
