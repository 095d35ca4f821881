"""The folders of one evaluation: images, labels, and doubts about them that the user should learn early."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastuft.config import EvalConfig
from fastuft.data import IMAGE_SUFFIXES, find_duplicates, labeled_folder, labels_of_images, list_images, verify_files
from fastuft.evaluate.inputs import quoted
from fastuft.names import printable

_LOOKED_FOR = 20.0  # seconds that looking for test images among the training images may take
# Names that folders of images have for other reasons than a class.
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "images", "unsorted"}
_ONE_CLASS = "only one class folder ({}), but accuracies need at least two"
_YEAR = re.compile(r"(19|20)\d\d([-_]\d\d){0,2}")


@dataclass(frozen=True)
class Images:
    """The images of one folder; labels and class names are empty if it has no class folders."""

    paths: Sequence[str]
    labels: np.ndarray
    classes: list[str]

    @property
    def labeled(self) -> bool:
        return bool(self.classes)


@dataclass(frozen=True)
class Folders:
    """The images of one evaluation.

    Args:
        train: training images of the target.
        test: test images of the target, or None; labels index the classes of ``train``.
        source: images of the source, or None.
        doubts: sentences about what may be a mistake, or was left out.
        bad_files: why a file was left out, by its name.
    """

    train: Images
    test: Images | None = None
    source: Images | None = None
    doubts: list[str] = dataclasses.field(default_factory=list)
    bad_files: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def judged(self) -> bool:
        """Whether accuracy on unseen images can be measured."""
        return self.train.labeled and self.test is not None and self.test.labeled

    def named(self) -> dict[str, Images]:
        """The existing folders by name."""
        found = {"train": self.train, "test": self.test, "source": self.source}
        return {name: images for name, images in found.items() if images is not None}


def read_images(folder: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Images:
    """The images of ``folder``: labeled if all of them are in sub-folders, or their shards have classes.

    Raises:
        ValueError: there are no images, or a sub-folder has none.
    """
    root = os.path.abspath(os.path.expanduser(folder))
    paths = list_images(folder, suffixes)
    said = labels_of_images(paths)
    if said is not None:
        return Images(paths, *said)
    if os.path.isdir(root) and isinstance(paths, list) and all(os.path.dirname(path) != root for path in paths):
        found, labels, classes = labeled_folder(folder, suffixes)
        return Images(found, np.asarray(labels), classes)
    return _without_labels(paths)


def _without_labels(paths: Sequence[str]) -> Images:
    return Images(paths, np.empty(0, np.int64), [])


def read_classes(name: str, folder: str, suffixes: Sequence[str] = IMAGE_SUFFIXES, *, fewest: int = 2) -> Images:
    """The labeled images of ``folder``, the value of the option ``name``.

    Raises:
        ValueError: fewer class folders than ``fewest``, or one without images.
    """
    found, labels, classes = labeled_folder(folder, suffixes)
    if len(classes) < fewest:
        raise ValueError(f"{name}={printable(folder)!r} has {_ONE_CLASS.format(quoted(classes))}")
    return Images(found, np.asarray(labels), classes)


def read_folders(config: EvalConfig) -> Folders:
    """The images of an evaluation.

    Raises:
        ValueError: a folder without images, test images of a class without training images, or only one training image.
    """
    bad_files: dict[str, str] = {}

    def read(name: str, folder: str) -> Images:
        images = read_images(folder, config.suffixes)
        if config.on_bad_file == "skip":
            images = _without_bad_files(name, images, bad_files)
        if len(images.classes) == 1 and name != "test":  # test images have the classes of the training images
            said.append(f"{name} has {_ONE_CLASS.format(quoted(images.classes))}, so its labels are ignored.")
            return _without_labels(images.paths)
        return images

    said: list[str] = []
    train = read("train", config.train)
    if len(train.paths) < 2:
        raise ValueError(f"train={config.train!r} has only one image; an evaluation needs at least two")
    test = read("test", config.test) if config.test else None
    source = read("source", config.source) if config.source else None
    doubts = said + [doubt for images in (train, source) if images is not None for doubt in _doubts(images.classes)]
    if test is not None and test.labeled and train.labeled:
        test, missing = in_classes_of(train, test)
        if missing:
            doubts.append(
                f"{len(missing)} classes of the training images have no test images ({quoted(missing)}), so retrieval and "
                "few-shot accuracy cover only the other classes."
            )
    if test is not None:
        doubts += _in_train(train, test)
    if bad_files:
        name, reason = next(iter(bad_files.items()))
        doubts.append(f"{len(bad_files)} bad files were left out (first: {name}: {reason}); eval.json lists them.")
    return Folders(train, test, source, doubts, bad_files)


def _without_bad_files(name: str, images: Images, bad_files: dict[str, str]) -> Images:
    """The images that can be decoded; the others are added to ``bad_files``."""
    bad = {entry.path: entry.reason for entry in verify_files(images.paths, decode=True)}
    if 2 * len(bad) > len(images.paths):
        path, reason = next(iter(bad.items()))
        raise ValueError(
            f"{len(bad)} of {len(images.paths)} files of {name} are bad, too many to leave out (first: "
            f"{printable(path)}: {reason}); run `fastuft verify-data` on the folder"
        )
    bad_files |= {printable(path): reason for path, reason in bad.items()}
    kept = [i for i, path in enumerate(images.paths) if path not in bad]
    paths = [images.paths[i] for i in kept]
    if not images.labeled:
        return Images(paths, images.labels, [])
    left, labels = np.unique(images.labels[kept], return_inverse=True)  # a class may have lost all its images
    return Images(paths, labels, [images.classes[label] for label in left])


def in_classes_of(train: Images, test: Images) -> tuple[Images, list[str]]:
    """The test images with labels that index the training images' classes, and the classes without test images.

    Raises:
        ValueError: test images of a class without training images.
    """
    missing = sorted(set(train.classes) - set(test.classes))
    extra = sorted(set(test.classes) - set(train.classes))
    if extra:
        raise ValueError(
            "test has class folders that train lacks: "
            f"{quoted(extra)} (only in train: {quoted(missing) or 'none'}). Rename or remove these folders"
        )
    position = {name: number for number, name in enumerate(train.classes)}
    labels = np.array([position[test.classes[label]] for label in test.labels], dtype=np.int64)
    return Images(test.paths, labels, train.classes), missing


def _in_train(train: Images, test: Images) -> list[str]:
    """One line if test images are among the training images, which inflates every accuracy."""
    found = find_duplicates(test.paths, known=train.paths, seconds=_LOOKED_FOR)
    if not found.pair:
        return []
    trained, tested = map(printable, found.pair)
    return [
        f"{found.repeated} of {found.checked} test images look like a training image (first: {tested} like {trained}): "
        "where they are copies, every accuracy below is flattered. Take them out of one of the two folders."
    ]


def _doubts(classes: Sequence[str]) -> list[str]:
    """One sentence if the names of the classes look like a mistake."""
    if not classes:
        return []
    splits = [name for name in classes if name.lower() in _SPLITS]
    years = [name for name in classes if _YEAR.fullmatch(name)]
    for found, what in ((splits, "parts of a data set"), (years, "dates")):
        if len(found) >= 2 or len(found) == len(classes):
            return [
                f"The sub-folders {quoted(found)} are treated as classes, but look like {what}. If they are, every "
                "accuracy below is meaningless: name the folders that hold the classes, or one without sub-folders."
            ]
    return []
