"""The folders of an evaluation: labels, mismatched classes, and accidental-looking class names."""

from __future__ import annotations

import pytest
from image_folders import write_images

from fastuft.config import EvalConfig
from fastuft.evaluate.folders import read_classes, read_folders, read_images


def folders_of(tmp_path, train, test=None):
    test_folder = write_images(tmp_path / "test", test, 2, 1) if test else None
    return read_folders(
        EvalConfig(checkpoint="c", train=write_images(tmp_path / "train", train, 2, 0), test=test_folder)
    )


def test_a_class_only_in_the_test_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train lacks: 'rot' \(only in train: 'red'\)"):
        folders_of(tmp_path, ["green", "red"], ["green", "rot"])


def test_test_labels_use_the_classes_of_the_training_set(tmp_path):
    folders = folders_of(tmp_path, ["blue", "green", "red"], ["blue", "red"])
    assert folders.judged and folders.test.labels.tolist() == [0, 0, 2, 2]
    assert folders.test.classes == folders.train.classes
    assert "1 classes of the training images have no test images ('green')" in folders.doubts[0]


@pytest.mark.parametrize("left", [["only"], ["only", "spoilt"]])
def test_labels_of_a_single_class_are_ignored_with_a_statement(tmp_path, left):
    train, source = (write_images(tmp_path / name, left, 3, 0) for name in ("train", "source"))
    for path in tmp_path.rglob("spoilt/*"):
        path.write_bytes(b"")
    config = EvalConfig(checkpoint="c", train=train, test=train, source=source, on_bad_file="skip")
    folders = read_folders(config)
    assert not folders.train.labeled and not folders.source.labeled and not folders.judged
    said = "has only one class folder ('only'), but accuracies need at least two, so its labels are ignored"
    assert [f"{name} {said}." for name in ("train", "source")] == folders.doubts[:2]


def test_requested_accuracies_need_two_classes(tmp_path):
    folder = write_images(tmp_path, ["only"], 3, 0)
    with pytest.raises(
        ValueError, match=r"watch\.train='.*' has only one class folder \('only'\), but accuracies need"
    ):
        read_classes("watch.train", folder)
    assert read_classes("watch.test", folder, fewest=1).classes == ["only"]


def test_other_suffixes_are_evaluated_when_named(tmp_path):
    train = write_images(tmp_path, ["blue", "red"], 2, 0)
    for path in list(tmp_path.rglob("*.png")):
        path.rename(path.with_suffix(".tif"))
    with pytest.raises(ValueError, match="has no images"):
        read_folders(EvalConfig(checkpoint="c", train=train))
    assert read_folders(EvalConfig(checkpoint="c", train=train, suffixes=(".tif",))).train.labels.tolist() == [
        0,
        0,
        1,
        1,
    ]


def test_a_single_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has only one image; an evaluation needs at least two"):
        read_folders(EvalConfig(checkpoint="c", train=write_images(tmp_path, ["one"], 1, 0) + "/one"))


def test_images_beside_sub_folders_mean_no_labels(tmp_path):
    write_images(tmp_path, ["mixed/red", "mixed/green"], 3, 0)
    (tmp_path / "mixed" / "red" / "0.png").rename(tmp_path / "mixed" / "loose.png")
    images = read_images(str(tmp_path / "mixed"))
    assert not images.labeled and len(images.paths) == 6


@pytest.mark.parametrize(
    ("classes", "what"),
    [(["train", "val"], "parts of a data set"), (["2023", "2024"], "dates"), (["2023-05", "2023-06", "trip"], "dates")],
)
def test_accidental_looking_class_names_raise_a_doubt(tmp_path, classes, what):
    (doubt,) = folders_of(tmp_path, classes).doubts
    assert repr(classes[0]) in doubt and f"look like {what}" in doubt


def test_ordinary_class_names_raise_no_doubt(tmp_path):
    assert folders_of(tmp_path, ["cat", "test", "1", "20"]).doubts == []


def test_a_class_without_readable_images_is_left_out(tmp_path):
    train = write_images(tmp_path, ["blue", "green", "red"], 4, 0)
    for path in (tmp_path / "green").iterdir():
        path.write_bytes(b"")
    folders = read_folders(EvalConfig(checkpoint="c", train=train, on_bad_file="skip"))
    assert folders.train.classes == ["blue", "red"] and folders.train.labels.tolist() == [0] * 4 + [1] * 4
    assert len(folders.bad_files) == 4


def test_a_folder_of_mostly_bad_files_is_refused(tmp_path):
    train = write_images(tmp_path, ["blue", "red"], 2, 0)
    for path in sorted(tmp_path.rglob("*.png"))[:3]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 4 files of train are bad, too many to leave out"):
        read_folders(EvalConfig(checkpoint="c", train=train, on_bad_file="skip"))
