"""Headers and orientation are read once for all decoders, whatever the metadata and however damaged."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import stream_cases
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from stream_cases import LOADERS, smooth_picture

from fastuft.data import BadImageError, EvalStream, image_size, open_rgb
from fastuft.data.encoded import DamagedHeaderError, orientation_of, plain, read_header

WIDTH, HEIGHT = 80, 48
TIFF = {"little": b"II*\0", "big": b"MM\0*"}


def tags(*entries, order="little", first=8):
    """A TIFF structure of entries (tag, type, count, value)."""
    sign = "<" if order == "little" else ">"
    body = b"".join(struct.pack(f"{sign}HHI", *entry[:3]) + struct.pack(f"{sign}HH", entry[3], 0) for entry in entries)
    return TIFF[order] + struct.pack(f"{sign}I", first) + struct.pack(f"{sign}H", len(entries)) + body + bytes(4)


def oriented(value, **options):
    return tags((0x0110, 2, 4, 0), (0x0112, 3, 1, value), **options)


def encode(kind):
    buffer = io.BytesIO()
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    smooth_picture(np.random.default_rng(0), WIDTH, HEIGHT).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def segment(content, marker=0xE1):
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def riff(*chunks):
    body = b"".join(n + struct.pack("<I", len(c)) + c + bytes(len(c) % 2) for n, c in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def with_exif(kind, exif, prefix=b"Exif\0\0"):
    """The picture with a block of tags, well-formed or not."""
    data = encode(kind)
    if kind == "JPEG":
        return data[:2] + segment(prefix + exif) + data[2:]
    if kind == "PNG":
        return data[:33] + chunk(b"eXIf", exif) + data[33:]
    extended = bytes((0x08, 0, 0, 0)) + struct.pack("<I", WIDTH - 1)[:3] + struct.pack("<I", HEIGHT - 1)[:3]
    return riff((b"VP8X", extended), (data[12:16], data[20:]), (b"EXIF", exif))


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
RAW_PROFILE = b"Raw profile type exif\0\0" + zlib.compress(
    b"\nexif\n    32\n" + (b"Exif\0\0" + oriented(6)).hex().encode()
)
UPRIGHT = {
    "doubled name.jpg": with_exif("JPEG", oriented(6), prefix=b"Exif\0\0Exif\0\0"),
    "wrong type.jpg": with_exif("JPEG", tags((0x0112, 4, 1, 6))),
    "two values.jpg": with_exif("JPEG", tags((0x0112, 3, 2, 6))),
    "value out of range.jpg": with_exif("JPEG", oriented(9)),
    "cut entry.jpg": with_exif("JPEG", oriented(6)[:-12]),
    "cut entry.png": with_exif("PNG", oriented(6)[:-12]),
    "cut entry.webp": with_exif("WEBP", oriented(6)[:-12]),
    "no byte order.jpg": with_exif("JPEG", b"XX" + oriented(6)[2:]),
    "tags beyond the end.jpg": with_exif("JPEG", oriented(6, first=4000)),
    "empty.jpg": with_exif("JPEG", b""),
    "rational out of range.jpg": with_exif("JPEG", tags((0x011A, 10, 1, 65535), (0x011B, 5, 9000, 1))),
    "XMP alone.jpg": (lambda d: d[:2] + segment(b"http://ns.adobe.com/xap/1.0/\0" + XMP) + d[2:])(encode("JPEG")),
    "XMP alone.png": (lambda d: d[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + d[33:])(encode("PNG")),
    "raw profile.png": (lambda d: d[:33] + chunk(b"zTXt", RAW_PROFILE) + d[33:])(encode("PNG")),
}


@pytest.mark.parametrize("order", TIFF)
@pytest.mark.parametrize("value", range(1, 9))
def test_the_tag_is_read_in_either_byte_order(order, value):
    assert orientation_of(oriented(value, order=order)) == value


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_both_loaders_apply_each_orientation_equally(tmp_path, kind):
    stored = Image.open(io.BytesIO(encode(kind))).convert("RGB")
    paths = []
    for value in range(1, 9):
        paths.append(str(tmp_path / f"{value}.{kind.lower()}"))
        (tmp_path / f"{value}.{kind.lower()}").write_bytes(with_exif(kind, oriented(value)))
        upright = np.asarray(open_rgb(paths[-1])).astype(int)
        expected = {
            1: np.asarray(stored),
            2: np.asarray(stored)[:, ::-1],
            3: np.asarray(stored)[::-1, ::-1],
            4: np.asarray(stored)[::-1],
            5: np.asarray(stored).transpose(1, 0, 2),
            6: np.rot90(np.asarray(stored), -1),
            7: np.asarray(stored)[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(np.asarray(stored), 1),
        }[value]
        assert np.array_equal(upright, expected), value
        assert image_size(paths[-1]) == expected.shape[1::-1]
    ours, theirs = (
        next(iter(EvalStream(paths, size=32, resize=40, loading=stream_cases.plain(loader))))[0] for loader in LOADERS
    )
    assert (ours - theirs).abs().max() < 3 / 255
    by_pillow = [open_rgb(path) for path in paths]
    for image, row in zip(by_pillow, ours, strict=True):
        width, height = (40 * side // min(image.size) for side in image.size)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        small = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 32, top + 32))
        assert np.abs(row.permute(1, 2, 0).numpy() * 255 - np.asarray(small)).max() < 4


def test_damaged_tags_and_other_metadata_do_not_rotate_images(tmp_path):
    paths = []
    for name, content in UPRIGHT.items():
        (tmp_path / name).write_bytes(content)
        paths.append(str(tmp_path / name))
        assert image_size(paths[-1]) == (WIDTH, HEIGHT), name
        assert open_rgb(paths[-1]).size == (WIDTH, HEIGHT), name
    ours, theirs = (
        next(iter(EvalStream(paths, size=32, resize=40, loading=stream_cases.plain(loader))))[0] for loader in LOADERS
    )
    assert (ours - theirs).abs().amax((1, 2, 3)).max() < 3 / 255


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_removing_metadata_keeps_the_pixels(kind):
    data = encode(kind) if kind == "BMP" else with_exif(kind, oriented(1))
    bare = plain(data, read_header(data))
    assert not read_header(bare).described
    assert (
        Image.open(io.BytesIO(bare)).convert("RGB").tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    )
    assert kind == "BMP" or len(bare) < len(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", [1, 6])
def test_the_tag_that_we_write_is_the_one_that_we_read(kind, value):
    data = with_exif(kind, oriented(3))
    again = plain(data, read_header(data), orientation=value)
    assert read_header(again).orientation == value
    assert Image.open(io.BytesIO(again)).getexif().get(0x0112, 1) == value


def test_text_beyond_the_pillow_limit_is_not_damage(tmp_path):
    data = encode("PNG")
    (tmp_path / "text.png").write_bytes(
        data[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000))) + data[33:]
    )
    assert open_rgb(str(tmp_path / "text.png")).size == (WIDTH, HEIGHT)
    for loader in LOADERS:
        stream = EvalStream([str(tmp_path / "text.png")], size=32, loading=stream_cases.plain(loader))
        assert next(iter(stream))[0].std() > 0.05


def test_a_header_without_pixels_or_end_is_damaged():
    for data in (encode("JPEG")[:40], b"\xff\xd8\xff\xd9", encode("PNG")[:20], encode("BMP")[:20]):
        with pytest.raises(DamagedHeaderError):
            read_header(data)
    assert read_header(b"GIF89a") is None and read_header(b"") is None


def read_all(image_file):
    """Read one file by every path: the sizes agree, or the error names the file."""
    try:
        size = image_size(str(image_file))
        pixels = open_rgb(str(image_file))
    except BadImageError as error:
        assert str(image_file) in str(error)
        return
    assert pixels.size == size


@pytest.mark.slow
@seed(0)
@settings(max_examples=800, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.sampled_from([b"", *TIFF.values()]))
def test_any_bytes_instead_of_tags_leave_a_readable_image(tmp_path_factory, exif, kind, start):
    data = with_exif(kind, start + exif)
    header = read_header(data)
    assert (header.width, header.height) == (WIDTH, HEIGHT) and 1 <= header.orientation <= 8
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind.lower()}"
    path.write_bytes(data)
    assert open_rgb(str(path)).size == header.size


@pytest.mark.slow
@seed(0)
@settings(max_examples=800, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]), st.data())
def test_damage_anywhere_gives_an_image_or_a_named_error(tmp_path_factory, kind, data):
    content = bytearray(encode(kind) if kind == "BMP" else with_exif(kind, oriented(6)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    path.write_bytes(bytes(content))
    read_all(path)
