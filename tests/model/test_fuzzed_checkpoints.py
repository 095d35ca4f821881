"""Damaged and malicious checkpoint files give a one-line error with the file name, quickly and without running code."""

from __future__ import annotations

import io
import json
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fastuft.model import build_backbone, load_init

pytestmark = pytest.mark.slow
FUZZ = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))

BACKBONE = build_backbone("resnet_tiny", "small")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from([*BACKBONE.state_dict(), "conv1.bias", "__metadata__", "." * 1000, "\x1b[31m\n", ""]) | st.text(
    max_size=30
)
DTYPES = st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "F64", "BOOL", "U64", "F4", "C64", "X"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": DTYPES,
        "shape": st.lists(st.integers(-1, 2**40) | st.integers(0, 8), max_size=5),
        "data_offsets": st.lists(st.integers(-1, 2**40) | st.integers(0, 64), max_size=3),
    }
)


def refused_or_loaded(path) -> None:
    """Load a file; it must succeed or raise a one-line ValueError that names it."""
    began = time.perf_counter()
    before = {name: value.clone() for name, value in BACKBONE.state_dict().items()}
    try:
        load_init(BACKBONE, path)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and text.isprintable() and len(text) < 2000 and path.name in text
        assert "weights_only" not in text
        assert all(torch.equal(value, before[name]) for name, value in BACKBONE.state_dict().items())
    assert time.perf_counter() - began < 5
    assert all(value.isfinite().all() for value in BACKBONE.state_dict().values())


@seed(0)
@FUZZ
@given(header=st.dictionaries(NAMES, ENTRIES | VALUES, max_size=6), body=st.binary(max_size=64))
def test_safetensors_headers(tmp_path_factory, header, body):
    encoded = json.dumps(header).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.mktemp("x") / "header.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)
    refused_or_loaded(path)


@seed(1)
@FUZZ
@given(said=VALUES, raw=st.none() | st.text(max_size=50))
@example(said={"arch": "resnet_tiny", "stem": "small", "traits": {"mean": [1, 2]}}, raw=None)
@example(said={"traits": {"norm_eps": [["*", "x"]]}}, raw=None)
def test_metadata_of_whole_safetensors(tmp_path_factory, said, raw):
    text = (json.dumps(said) if raw is None else raw).encode("utf-8", "replace").decode()
    path = tmp_path_factory.mktemp("x") / "metadata.safetensors"
    path.write_bytes(save(BACKBONE.state_dict(), metadata={"fastuft": text}))
    refused_or_loaded(path)


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    names = {name.replace(".", "/"): value.numpy() for name, value in BACKBONE.state_dict().items()}
    np.savez(buffer, **dict(list(names.items())[:4]))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [numpy_archive, lambda: save(BACKBONE.state_dict())], ids=["npz", "safetensors"])
@seed(2)
@FUZZ
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=8), cut=st.floats(0, 1) | st.none())
def test_flipped_and_truncated_files(tmp_path_factory, make, flips, cut):
    content = bytearray(make())
    for position, change in flips:
        # half of the changes are in the first 2 KB, where headers are
        content[int(position * (len(content) - 1)) if change % 2 else int(position * 2047)] ^= change
    if cut is not None:
        content = content[: int(cut * len(content))]
    path = tmp_path_factory.mktemp("x") / "damaged"
    path.write_bytes(bytes(content))
    refused_or_loaded(path)


@seed(3)
@FUZZ
@given(
    header=st.text(max_size=80)
    | st.builds(
        repr,
        st.fixed_dictionaries(
            {
                "descr": st.sampled_from(["<f4", ">f8", "|O", "<U4", "|V8", "<M8[s]", "<c16", "|b1", "<f2", "x"]),
                "fortran_order": st.booleans(),
                "shape": st.lists(st.integers(-1, 2**40) | st.integers(0, 8), max_size=4).map(tuple),
            }
        ),
    ),
    body=st.binary(max_size=64),
)
def test_numpy_headers(tmp_path_factory, header, body):
    encoded = header.encode("latin1", "replace") + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + body
    path = tmp_path_factory.mktemp("x") / "header.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conv1.weight.npy", member)
    refused_or_loaded(path)
