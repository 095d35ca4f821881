"""Finding image files: folders at any depth, list files, single files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastuft.atomic import write_whole
from fastuft.data.list_files import LIST_SUFFIXES, read_list
from fastuft.data.reading import in_threads
from fastuft.messages import note
from fastuft.names import printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_JUNK = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
_SCAN_CACHE_FROM = 20_000  # smaller folders are scanned anew each time
_SCANNERS = min(32, 4 * (os.cpu_count() or 1))  # threads that wait for the file system
_NAMED = 6  # suffixes of left-out files that are named


@dataclass(frozen=True)
class Listing:
    """Images in the order of training.

    Args:
        paths: absolute paths.
        names: the same relative to what was listed; with the files' sizes they say which data it is, wherever it lies.
    """

    paths: list[str]
    names: list[str]


@dataclass
class _Scan:
    """What a folder holds."""

    files: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)  # and the modification time of each
    left_out: Counter[str] = field(default_factory=Counter)  # files of other suffixes
    junk: Counter[str] = field(default_factory=Counter)  # folders that hold no one's photographs


def find_images(paths: str | Sequence[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Listing:
    """All image files of folders (any depth), list files and single files.

    Hidden entries and folders that systems leave behind (``__MACOSX``, ``@eaDir``) are passed over. Files of other
    suffixes are left out, and one line says how many. A list file (.txt, .csv, .tsv, .lst) names an image per line,
    relative to itself; see :func:`fastuft.data.list_files.read_list`.

    Args:
        paths: one or several of them. Duplicates are kept once.
        suffixes: of image files in folders, in any case; "" is a name without one.

    Raises:
        ValueError: a path that does not exist, a root without images, a folder that cannot be read, a line of a list
            that names no image, or a suffix that does not begin with a dot.
    """
    wanted = _checked(suffixes)
    found: dict[str, str] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        root = os.path.abspath(os.path.expanduser(path))
        if os.path.isdir(root):
            scan = _scan_cached(root, wanted)
            files, base = scan.files, root
            _say_left_out(root, scan)
        elif os.path.splitext(root)[1].lower() in LIST_SUFFIXES and os.path.lexists(root):
            files = read_list(root, _is_image(wanted), lambda folder: _scan_folder(folder, wanted).files)
            base = _common_folder(files)
        elif os.path.lexists(root):
            files, base = [root], os.path.dirname(root)
        else:
            raise ValueError(
                f"'{printable(path)}' does not exist; name a folder of images, an image, or a list file "
                f"({', '.join(LIST_SUFFIXES)})"
            )
        if not files:
            raise ValueError(
                f"'{printable(path)}' holds no images; expected files ending in {' '.join(wanted)} at any depth"
            )
        skip = len(base.rstrip(os.sep)) + 1
        for file in files:
            found.setdefault(file, file[skip:])
    return Listing(list(found), list(found.values()))


def list_images(paths: str | Sequence[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[str]:
    """The absolute paths that :func:`find_images` finds, sorted within each root."""
    return find_images(paths, suffixes).paths


def labeled_folder(path: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> tuple[list[str], list[int], list[str]]:
    """Images of class sub-folders; those that lie beside the sub-folders are left out, which is said.

    An image that links lead to from several classes is one of the first alone, as in :func:`find_images`.

    Returns:
        (paths, labels, class names): classes are the sub-folders in sorted order, images of a class at any depth.

    Raises:
        ValueError: no class sub-folders, or one without images.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise ValueError(f"'{printable(path)}' is not a folder; labels need one sub-folder per class")
    inner = _read_folder(root, _is_image(_checked(suffixes)))[0]
    names = sorted(os.path.basename(folder) for folder, _ in inner)
    if not names:
        raise ValueError(f"'{printable(path)}' has no class sub-folders; labels need one sub-folder per class")
    of_class: dict[str, list[str]] = {name: [] for name in names}
    found = find_images(root, suffixes)
    for file, name in zip(found.paths, found.names, strict=True):
        first, inside, _ = name.partition(os.sep)
        if inside:
            of_class[first].append(file)
    if empty := [name for name in names if not of_class[name]]:
        raise ValueError(
            f"'{printable(os.path.join(root, empty[0]))}' holds no images of its own (expected are files ending in "
            f"{' '.join(suffixes)}); each sub-folder of '{printable(path)}' is a class, remove those without"
        )
    paths = [file for name in names for file in of_class[name]]
    if beside := len(found.paths) - len(paths):
        note(f"'{printable(root)}': {beside} images beside the class sub-folders are left out")
    labels = [label for label, name in enumerate(names) for _ in of_class[name]]
    return paths, labels, names


def _checked(suffixes: Sequence[str]) -> tuple[str, ...]:
    for suffix in suffixes:
        if suffix and (not suffix.startswith(".") or os.sep in suffix):
            raise ValueError(f"suffix {suffix!r} is not allowed; suffixes begin with a dot, as in .tif")
    return tuple(suffix.lower() for suffix in suffixes)


def _is_image(suffixes: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda name: os.path.splitext(name)[1].lower() in suffixes


def _common_folder(files: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""


def _say_left_out(root: str, scan: _Scan) -> None:
    parts = []
    if scan.left_out:
        counts = sorted(scan.left_out.items(), key=lambda item: (-item[1], item[0] or "~"))[:_NAMED]
        named = [f"{number} {printable(suffix) or 'without a suffix'}" for suffix, number in counts]
        more = ", and others" if len(scan.left_out) > _NAMED else ""
        parts.append(f"{scan.left_out.total()} other files ({', '.join(named)}{more})")
    parts += [f"{number} x the folder {name}" for name, number in sorted(scan.junk.items())]
    if parts:
        hint = "; data.suffixes names what else is an image" if scan.left_out else ""
        note(f"'{printable(root)}': {len(scan.files)} images; left out: {', '.join(parts)}{hint}")


def _read_folder(folder: str, is_image: Callable[[str], bool]) -> tuple[list[tuple[str, bool]], list[str], _Scan]:
    """([(sub-folder, whether it is a link)], image files, what is left out) of one folder."""
    inner: list[tuple[str, bool]] = []
    found: list[str] = []
    others = _Scan()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    if entry.name in _JUNK:
                        others.junk[entry.name] += 1
                    else:
                        inner.append((entry.path, entry.is_symlink()))
                elif is_image(entry.name):
                    found.append(entry.path)
                else:
                    others.left_out[os.path.splitext(entry.name)[1].lower()] += 1
    except OSError as error:
        raise ValueError(
            f"the folder '{printable(folder)}' cannot be read ({error.strerror or error}); mend its permissions, or move it "
            "out of the images"
        ) from error
    return inner, found, others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _scan_folder(root: str, suffixes: tuple[str, ...]) -> _Scan:
    """Everything below ``root``; folders are read by several threads.

    Links are followed; a folder that is reached by several ways is read once.
    """
    scan = _Scan()
    is_image = _is_image(suffixes)

    def read(folder: str) -> tuple[list[tuple[str, bool]], list[str], _Scan, int]:
        modified = os.stat(folder).st_mtime_ns  # before reading: a file that comes meanwhile makes it out of date
        return *_read_folder(folder, is_image), modified

    level = [(root, os.path.realpath(root))]
    seen = {level[0][1]}
    while level:
        following: list[tuple[str, str]] = []
        read_level = in_threads(read, [folder for folder, _ in level], _SCANNERS, chunk=8)
        for (folder, real), (inner, found, others, modified) in zip(level, read_level, strict=True):
            scan.files += found
            scan.folders[folder] = modified
            scan.left_out += others.left_out
            scan.junk += others.junk
            for candidate, is_link in sorted(inner):
                where = os.path.realpath(candidate) if is_link else os.path.join(real, os.path.basename(candidate))
                if where not in seen:
                    seen.add(where)
                    following.append((candidate, where))
        level = following
    scan.files.sort()
    return scan


def _cache_file(root: str, suffixes: tuple[str, ...]) -> Path | None:
    """Where a scan is kept; None where there is no home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        return None
    key = hashlib.blake2b(os.fsencode("\0".join([root, *suffixes])), digest_size=12).hexdigest()
    return Path(home) / "fastuft" / f"scan-{key}.json"


def _scan_cached(root: str, suffixes: tuple[str, ...]) -> _Scan:
    """As ``_scan_folder``; a large tree is scanned again only when one of its folders has changed."""
    place = _cache_file(root, suffixes)
    if place is not None:
        try:
            known = json.loads(place.read_text())
            scan = _Scan(known["files"], known["folders"], Counter(known["left_out"]), Counter(known["junk"]))
            if known["root"] == root and all(os.stat(f).st_mtime_ns == m for f, m in scan.folders.items()):
                return scan
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no cache, an unreadable one, or a folder that is gone: scan
    scan = _scan_folder(root, suffixes)
    if place is not None and len(scan.files) >= _SCAN_CACHE_FROM:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            content = {"root": root, **vars(scan)}
            write_whole(place, json.dumps(content).encode(), flush=False)
        except OSError:
            pass  # the cache only saves time
    return scan
