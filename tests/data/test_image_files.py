"""Image files of every kind: which are read, how, and which are refused."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from stream_cases import LOADERS, plain, stream_of

from fastuft.config import AugmentConfig, DataConfig
from fastuft.data import (
    BadImageError,
    EvalStream,
    Manifest,
    image_size,
    list_images,
    open_rgb,
    verify_files,
    write_bad_list,
)

WIDTH, HEIGHT = 64, 48


def picture(width=WIDTH, height=HEIGHT):
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png_16_bit_rgb(image):
    """A 16-bit RGB PNG, which Pillow does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    pixels = (np.asarray(image).astype(np.uint16) * 257).astype(">u2")
    header = struct.pack(">IIBBBBB", *image.size, 16, 2, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def half_transparent(image):
    pixels = np.dstack([np.asarray(image), np.full(image.size[::-1], 255, np.uint8)])
    pixels[:, : WIDTH // 2, 3] = 0
    return Image.fromarray(pixels)


def turned(image, orientation, path, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **options)


def write(kind, path):
    """Write one kind of image; returns the expected upright RGB pixels."""
    image = picture()
    gray = image.convert("L")
    pixels = np.asarray(image)
    if kind == "gray.jpg":
        gray.save(path, quality=100)
        return np.asarray(gray.convert("RGB"))
    if kind == "cmyk.jpg":
        image.convert("CMYK").save(path, quality=100, subsampling=0)
    elif kind == "progressive.jpg":
        image.save(path, quality=100, subsampling=0, progressive=True)
    elif kind == "mpo.jpg":
        image.save(path, format="MPO", save_all=True, append_images=[gray.convert("RGB")], quality=100, subsampling=0)
    elif kind == "16-bit-gray.png":
        Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(path)
        return np.asarray(gray.convert("RGB"))
    elif kind == "16-bit-rgb.png":
        path.write_bytes(png_16_bit_rgb(image))
    elif kind in ("palette.png", "palette.bmp"):
        palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
        palette.save(path)
        return np.asarray(palette.convert("RGB"))
    elif kind == "one-bit.png":
        image.convert("1").save(path)
        return np.asarray(image.convert("1").convert("RGB"))
    elif kind in ("transparent.png", "transparent.webp"):
        half_transparent(image).save(path, **({"lossless": True, "exact": True} if kind.endswith("webp") else {}))
    elif kind in ("animated.png", "animated.webp"):
        options = {"lossless": True} if kind.endswith("webp") else {}
        image.save(path, save_all=True, append_images=[Image.new("RGB", image.size)], duration=50, **options)
    elif kind.startswith("exif"):
        orientation = int(kind[4])
        options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(
            kind.rpartition(".")[2], {}
        )
        turned(image, orientation, path, **options)
        turns = {3: 2, 6: 3, 8: 1}  # quarter turns counter-clockwise that make it upright
        return np.rot90(pixels, turns[orientation]) if orientation in turns else np.rot90(pixels, 3)[:, ::-1]
    elif kind.startswith("one-pixel"):
        image.resize((1, 1)).save(path)
        return np.asarray(image.resize((1, 1)))
    elif kind == "film-behind.jpg":  # telephones append a film of any length
        image.save(path, quality=100, subsampling=0)
        with open(path, "ab") as file:
            file.write(b"\0" * 200_000)
    return pixels


KINDS = [
    "gray.jpg",
    "cmyk.jpg",
    "progressive.jpg",
    "mpo.jpg",
    "16-bit-gray.png",
    "16-bit-rgb.png",
    "palette.png",
    "palette.bmp",
    "one-bit.png",
    "transparent.png",
    "transparent.webp",
    "animated.png",
    "animated.webp",
    *(f"exif{orientation}.{suffix}" for orientation in (3, 5, 6, 8) for suffix in ("jpg", "png", "webp")),
    "one-pixel.jpg",
    "one-pixel.png",
    "film-behind.jpg",
]


def test_each_format_is_read_upright_as_rgb(tmp_path):
    """Grayscale, palette, CMYK, 16 bits, transparency (dropped), first frame and orientation are equal in both loaders."""
    paths = [tmp_path / kind for kind in KINDS]
    truth = [np.ascontiguousarray(write(kind, path)) for kind, path in zip(KINDS, paths, strict=True)]
    assert verify_files(map(str, paths), decode=True) == []
    read = {
        loader: next(iter(EvalStream(list(map(str, paths)), size=32, resize=32, loading=plain(loader))))[0]
        for loader in LOADERS
    }
    for row, (kind, path, expected) in enumerate(zip(KINDS, paths, truth, strict=True)):
        assert image_size(str(path)) == expected.shape[1::-1], kind
        assert np.abs(np.asarray(open_rgb(str(path))).astype(int) - expected).mean() < 3, kind
        width, height = (32 * side // min(expected.shape[:2]) for side in expected.shape[1::-1])
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        resized = Image.fromarray(expected).resize((width, height), Image.Resampling.BILINEAR)
        small = resized.crop((left, top, left + 32, top + 32))
        for loader in LOADERS:
            difference = np.abs(read[loader][row].permute(1, 2, 0).numpy() * 255 - np.asarray(small))
            assert difference.mean() < 3, (kind, loader)


def test_metadata_that_dali_cannot_parse_is_removed(tmp_path, capsys):
    """DALI's parser misreads what follows a chunk of odd length in WebP files."""
    generator = np.random.default_rng(0)
    for index in range(32):
        noise = Image.fromarray(generator.integers(0, 256, (20, 20 + index, 3), dtype=np.uint8))
        turned(noise, 1, tmp_path / f"{index:02d}.webp", lossless=True)
    paths = list_images(str(tmp_path))
    stream = EvalStream(paths, size=20, resize=20, loading=plain("dali"))
    images, _ = next(iter(stream))
    assert "Pillow" not in capsys.readouterr().err
    theirs, _ = next(iter(EvalStream(paths, size=20, resize=20, loading=plain("torch"))))
    assert (images - theirs).abs().max() < 0.01
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_pillow_only_formats_are_read_when_named(tmp_path, loader):
    """A rotated TIFF and a GIF; with the suffix of another format they are bad files."""
    turned(picture(), 6, tmp_path / "a.tif")
    picture().convert("P").save(tmp_path / "b.gif")
    paths = list_images(str(tmp_path), (".tif", ".gif"))
    images, _ = next(iter(EvalStream(paths, size=32, resize=32, loading=plain(loader))))
    assert image_size(paths[0]) == (HEIGHT, WIDTH) and image_size(paths[1]) == (WIDTH, HEIGHT)
    for path, image in zip(paths, images, strict=True):
        upright = open_rgb(path)
        width, height = (32 * side // min(upright.size) for side in upright.size)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        small = upright.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 32, top + 32))
        assert np.abs(image.permute(1, 2, 0).numpy() * 255 - np.asarray(small)).max() < 4
    (tmp_path / "b.gif").rename(tmp_path / "b.jpg")
    with pytest.raises(BadImageError, match=r"b\.jpg: is a GIF file"):
        list(EvalStream([str(tmp_path / "b.jpg")], size=32, loading=plain(loader)))


def test_a_very_wide_image_is_read(tmp_path):
    picture(30_000, 400).save(tmp_path / "wide.jpg")
    images = [next(iter(EvalStream([str(tmp_path / "wide.jpg")], size=32, loading=plain(each))))[0] for each in LOADERS]
    assert (images[0] - images[1]).abs().max() < 0.02


def bomb(width, height):
    """A tiny PNG whose header declares a giant image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + crc + b"\0\0\0\0IEND\xaeB`\x82"


def thumbnail_then_cut(path):
    """A truncated JPEG with a whole thumbnail in its metadata."""
    picture().save(path.with_suffix(".thumb"), format="JPEG")
    thumbnail = path.with_suffix(".thumb").read_bytes()
    picture(640, 480).save(path, quality=95)
    content = path.read_bytes()
    exif = b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    return content[:2] + segment + content[2 : len(content) // 2]


BAD = {
    "empty.jpg": (lambda path: b"", "is empty"),
    "html.jpg": (lambda path: b"<!DOCTYPE html><html>Not found</html>" * 9, "is not an image"),
    "gif.jpg": (lambda path: (picture().convert("P").save(path, format="GIF"), path.read_bytes())[1], "a GIF file"),
    "cut.jpg": (lambda path: (picture(640, 480).save(path), path.read_bytes()[:-900])[1], "is truncated"),
    "cut.png": (lambda path: (picture(640, 480).save(path), path.read_bytes()[:-900])[1], "is truncated"),
    "cut.webp": (lambda path: (picture(640, 480).save(path), path.read_bytes()[:-900])[1], "is truncated"),
    "thumbnail.jpg": (thumbnail_then_cut, "is truncated"),
    "header-only.png": (lambda path: b"\x89PNG\r\n\x1a\n", "has a damaged header .ends within"),
    "large.png": (lambda path: bomb(13_000, 13_500), "above data.max_megapixels=170"),
    "bomb.png": (lambda path: bomb(200_000, 200_000), "200000 x 200000 pixels, above"),
    "strip.png": (lambda path: bomb(30_000, 20), "more than 100 to 1"),
}


# pytest undoes the package's own filter.
ignore_bombs = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@ignore_bombs
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_decoding(tmp_path, name):
    make, reason = BAD[name]
    path = tmp_path / name
    content = make(path)
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=reason):
        image_size(str(path), max_megapixels=170)


def moco_stream(paths, loader, **changes):
    """Batches of two, all images in each epoch."""
    manifest = Manifest.build(list(map(str, paths)))
    data = DataConfig(batch_size=2, drop_last=False, threads=1, loader=loader, max_megapixels=170, **changes)
    return stream_of(manifest, data, AugmentConfig(size=32), seed=0)


@ignore_bombs
@pytest.mark.parametrize("loader", LOADERS)
def test_training_names_or_replaces_bad_files(tmp_path, loader):
    good = [tmp_path / f"good{index}.jpg" for index in range(len(BAD) + 2)]
    for path in good:
        picture().save(path)
    bad = []
    for name, (make_content, reason) in BAD.items():
        path = tmp_path / name
        path.write_bytes(make_content(path))
        bad.append(path)
        with pytest.raises(BadImageError, match=rf"{re.escape(str(path))}: .*{reason}.*on_bad_file=skip"):
            list(moco_stream([*good[:3], path], loader).epoch(0))
    assert [entry.path for entry in verify_files(map(str, [*good, *bad]), max_megapixels=170)] == list(map(str, bad))
    stream = moco_stream([*good, *bad], loader, on_bad_file="skip")
    batches = list(stream.epoch(0))
    index = torch.cat([batch.index for batch in batches])
    assert len(index) == len(good) + len(bad) and index.max() < len(good)
    assert set(index.tolist()) == set(range(len(good)))  # each good one is there, some more than once
    assert [
        (entry.path, bool(re.search(BAD[os.path.basename(entry.path)][1], entry.reason))) for entry in stream.bad_files
    ] == [(str(path), True) for path in bad]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "cannot be read .*No such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:4000]), "has changed since it was first read"),
        (lambda path: picture(160, 120).save(path, quality=95), "has changed .*was 320 x 240.*is 160 x 120"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read .*it is a pipe"),
    ],
    ids=["vanished", "emptied", "cut", "smaller", "pipe"],
)
def test_a_file_damaged_during_training_is_named_or_replaced(tmp_path, loader, spoil, reason):
    """The crop is drawn for the bytes that are decoded; a region beyond the pixels would crash the process."""
    paths = [tmp_path / f"{index}.jpg" for index in range(6)]
    for path in paths:
        picture(320, 240).save(path, quality=95)
    streams = [moco_stream(paths, loader, on_bad_file=rule) for rule in ("error", "skip")]
    for stream in streams:
        list(stream.epoch(0))
    spoil(paths[4])
    with pytest.raises(BadImageError, match=rf"4\.jpg: {reason}.*on_bad_file=skip"):
        list(streams[0].epoch(1))
    index = torch.cat([batch.index for batch in streams[1].epoch(1)])
    assert len(index) == 6 and set(index.tolist()) == {0, 1, 2, 3, 5}
    assert [entry.path for entry in streams[1].bad_files] == [str(paths[4])]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_rewritten_file_of_equal_length_and_size_is_read_again(tmp_path, loader):
    """The drawn crops still fit; modification times change for many reasons and are not compared."""
    paths = [tmp_path / f"{index}.bmp" for index in range(6)]
    for path in paths:
        Image.new("RGB", (64, 48), (10, 10, 10)).save(path)
    data = DataConfig(batch_size=2, threads=1, loader=loader)
    stream = stream_of(Manifest.build(list(map(str, paths))), data, AugmentConfig(size=32, jitter_p=0.0), seed=0)

    def bright(epoch):
        batches = list(stream.epoch(epoch))
        views, index = torch.cat([batch.query for batch in batches]), torch.cat([batch.index for batch in batches])
        return index[views.flatten(1).mean(1) > 0.9].tolist()

    assert bright(0) == []
    Image.new("RGB", (64, 48), (250, 250, 250)).save(paths[4])
    assert bright(1) == [4] and stream.bad_files == []


@pytest.mark.parametrize("loader", LOADERS)
def test_tiny_and_very_wide_images_train(tmp_path, loader):
    """Images of one pixel and of 30,000 pixels in a row, together with ordinary ones."""
    sizes = [(1, 1), (30_000, 400), (64, 48), (1, 40)]
    for index, size in enumerate(sizes):
        picture(*size).save(tmp_path / f"{index}.png")
    paths = sorted(tmp_path.iterdir())
    assert verify_files(map(str, paths), decode=True) == []
    batches = list(moco_stream(paths, loader).epoch(0))
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == [0, 1, 2, 3]
    for batch in batches:
        for index, view in zip(batch.index.tolist(), batch.query, strict=True):
            assert view.isfinite().all() and (view.flatten(1).std(1) < 1e-3).all() == (index == 0)


@pytest.mark.parametrize("loader", LOADERS)
def test_file_names_that_are_not_text_work(tmp_path, loader):
    """Names in another encoding are read, listed by list files, shown in messages, and written to the list of bad files."""
    for name in (b"caf\xe9.jpg", b"bad\xff.jpg"):
        (tmp_path / os.fsdecode(name)).touch()
    picture().save(tmp_path / os.fsdecode(b"caf\xe9.jpg"))
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\r\n")
    assert len(list(moco_stream([tmp_path / "list.txt"], loader).epoch(0))) == 1
    manifest = Manifest.build(str(tmp_path))
    manifest.save(tmp_path / "manifest.json")
    assert json.loads((tmp_path / "manifest.json").read_text())["paths"] == list(manifest.paths)
    with pytest.raises(BadImageError, match=r"bad\\xff\.jpg: is empty"):
        list(moco_stream([tmp_path], loader).epoch(0))
    bad = verify_files(manifest.paths)
    assert [str(entry) for entry in bad] == [f"{tmp_path}/bad\\xff.jpg: is empty"]
    write_bad_list(tmp_path / "bad.txt", bad)
    assert (tmp_path / "bad.txt").read_bytes() == os.fsencode(tmp_path) + b"/bad\\xff.jpg\tis empty\n"


@pytest.mark.parametrize(
    "make_place", [lambda p: p / "gone.jpg", lambda p: p, lambda p: "/dev/zero"], ids=["vanished", "folder", "device"]
)
def test_files_that_cannot_be_read_are_named(tmp_path, make_place):
    with pytest.raises(BadImageError, match=rf"{make_place(tmp_path)}: cannot be read .*verify-data"):
        image_size(str(make_place(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_files_without_permission_are_named(tmp_path):
    path = tmp_path / "secret.png"
    picture().save(path)
    path.chmod(0)
    with pytest.raises(BadImageError, match="cannot be read"):
        image_size(str(path))


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_stops_at_a_bad_file_or_leaves_it_out(tmp_path, loader):
    for index in range(4):
        picture().save(tmp_path / f"{index}.bmp")
    (tmp_path / "2.bmp").write_bytes((tmp_path / "2.bmp").read_bytes()[:-500])  # header whole, pixels missing
    paths = list_images(str(tmp_path))
    with pytest.raises(BadImageError, match=r"2\.bmp: cannot be decoded .*verify-data") as caught:
        list(EvalStream(paths, size=32, batch_size=2, loading=plain(loader)))
    assert "on_bad_file=skip" in str(caught.value)
    skipping = EvalStream(paths, [5, 6, 7, 8], size=32, batch_size=2, loading=plain(loader, on_bad_file="skip"))
    assert [labels.tolist() for _, labels in skipping] == [[5, 6], [8]]
    assert [entry.path for entry in skipping.bad_files] == [paths[2]]
    assert verify_files(paths) == []
    assert [entry.path for entry in verify_files(paths, decode=True)] == [paths[2]]


def test_verification_lists_bad_files_in_order_and_reports_progress(tmp_path):
    for index in range(40):
        picture().save(tmp_path / f"{index:02d}.jpg")
    for index in (31, 7):
        (tmp_path / f"{index:02d}.jpg").write_bytes(b"")
    done = []
    bad = verify_files(list_images(str(tmp_path)), progress=done.append)
    assert [os.path.basename(entry.path) for entry in bad] == ["07.jpg", "31.jpg"] and sum(done) == 40
    write_bad_list(tmp_path / "bad.txt", bad)
    assert (tmp_path / "bad.txt").read_text().splitlines()[0] == f"{bad[0].path}\tis empty"
