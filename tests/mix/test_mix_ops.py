"""CutMix and MixUp: the extension against the plain reference, over shapes, layouts, dtypes, boxes and partners."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastuft
from fastuft.mix import ops, reference

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
ORDERS = list(itertools.permutations(range(4)))
RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_the_extension_is_built_here():
    """The suite must not pass on the reference alone without saying so."""
    if not ops.HAS_CPU_EXTENSION:
        pytest.skip("the compiled extension _C is not built on this machine")


@pytest.mark.parametrize("name", ["cutmix", "cutmix_", "mixup", "mixup_"])
def test_the_fallback_has_the_schema_of_the_extension(name):
    schema = str(getattr(torch.ops.fastuft, name).default._schema)
    assert schema.replace("a!", "a0!") == f"fastuft::{ops.reference_schema(name)}"


def fill(shape, dtype, order, seed):
    """Random images whose memory order of dimensions is ``order``."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, [shape[d] for d in order], generator=generator)
    stored = stored.to(torch.uint8) if dtype == torch.uint8 else ((stored - 128) / 37).to(dtype)
    return stored.permute([order.index(d) for d in range(4)])


@st.composite
def batches(draw, in_place=False):
    """(images, boxes, partner, lam) of any small shape, layout and dtype."""
    shape = [draw(st.integers(1, 7)), *(draw(st.integers(1, 9)) for _ in range(3))]
    images = fill(shape, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(ORDERS)), draw(st.integers(0, 99)))
    rows = shape[0] // 2 if in_place else shape[0]
    boxes = []
    for _ in range(rows):
        top, bottom = sorted(draw(st.integers(0, shape[2])) for _ in range(2))
        left, right = sorted(draw(st.integers(0, shape[3])) for _ in range(2))
        boxes.append([top, left, bottom, right])
    partner = [draw(st.integers(0, shape[0] - 1)) for _ in range(shape[0])]
    lam = [draw(st.floats(0, 1, width=32)) for _ in range(rows)]
    return (
        images,
        torch.tensor(boxes, dtype=torch.int32).reshape(rows, 4),
        torch.tensor(partner),
        torch.tensor(lam, dtype=torch.float32),
    )


@RELAXED
@given(batches())
def test_cutmix_equals_the_reference_bitwise(batch):
    images, boxes, partner, _ = batch
    before = images.clone()
    mixed = fastuft.cutmix(images, boxes, partner)
    assert torch.equal(mixed, reference.cutmix(images, boxes, partner))
    assert torch.equal(images, before) and mixed.dtype == images.dtype
    assert mixed.data_ptr() != images.data_ptr()


@RELAXED
@given(batches(in_place=True))
def test_cutmix_in_place_equals_the_reference_bitwise(batch):
    images, boxes, _, _ = batch
    expected = images.clone()
    reference.cutmix_(expected, boxes)
    assert fastuft.cutmix_(images, boxes) is images
    assert torch.equal(images, expected)


@RELAXED
@given(batches())
def test_mixup_rounds_once(batch):
    images, _, partner, lam = batch
    mixed = fastuft.mixup(images, lam, partner)
    assert mixed.dtype == images.dtype
    torch.testing.assert_close(mixed, reference.mixup(images, lam, partner), rtol=0, atol=0)


@RELAXED
@given(batches(in_place=True))
def test_mixup_in_place_rounds_once(batch):
    images, _, _, lam = batch
    expected = images.clone()
    reference.mixup_(expected, lam)
    fastuft.mixup_(images, lam)
    torch.testing.assert_close(images, expected, rtol=0, atol=0)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_grouped_pairs_equal_separate_calls_per_group(group, form):
    images = torch.rand(12, 3, 9, 7).contiguous(memory_format=form)
    pairs = 12 // group * (group // 2)
    boxes, lam = fastuft.sample_boxes(pairs, 9, 7, generator=torch.Generator().manual_seed(group))
    mixed, expected, plain = images.clone(), images.clone(), images.clone()
    for part, own in zip(expected.split(group), boxes.split(group // 2) if pairs else [boxes] * 12, strict=True):
        fastuft.cutmix_(part, own)
    fastuft.cutmix_(mixed, boxes, group)
    reference.cutmix_(plain, boxes, group)
    assert torch.equal(mixed, expected) and torch.equal(plain, expected)
    for part, own in zip(expected.split(group), lam.split(group // 2) if pairs else [lam] * 12, strict=True):
        fastuft.mixup_(part, own)
    fastuft.mixup_(mixed, lam, group)
    reference.mixup_(plain, lam, group)
    assert torch.equal(mixed, expected) and torch.equal(plain, expected)


def test_a_failed_check_does_not_bump_the_version_counter():
    images = torch.rand(4, 3, 4, 4)
    before = images._version
    with pytest.raises(ValueError, match="does not fit"):
        fastuft.cutmix_(images, BOX[:2] + 9)
    assert images._version == before


def brute_force_cutmix(images, boxes, partner):
    """Pixel by pixel, as the definition says."""
    mixed = images.clone()
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        for y, x in itertools.product(range(top, bottom), range(left, right)):
            mixed[i, :, y, x] = images[partner[i], :, y, x]
    return mixed


def test_the_reference_equals_the_definition():
    images = fill([5, 3, 6, 7], torch.float32, (0, 1, 2, 3), 0)
    boxes, lam = fastuft.sample_boxes(5, 6, 7, generator=torch.Generator().manual_seed(1))
    partner = torch.tensor([4, 4, 0, 3, 1])
    mixed = brute_force_cutmix(images, boxes, partner)
    assert torch.equal(reference.cutmix(images, boxes, partner), mixed)
    kept = (mixed == images).all(1).flatten(1).float().mean(1)
    assert (kept >= lam - 1e-6).all()  # equal pixels by chance aside, lam is the share that remains


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_odd_batches_keep_the_middle_sample(batch):
    images = fill([batch, 2, 4, 4], torch.float32, (0, 2, 3, 1), 0)
    before = images.clone()
    whole = torch.tensor([[0, 0, 4, 4]] * (batch // 2), dtype=torch.int32).reshape(-1, 4)
    fastuft.cutmix_(images, whole)
    assert torch.equal(images, before.flip(0))


def test_non_dense_views_are_supported():
    base = fill([6, 3, 8, 20], torch.float32, (0, 1, 2, 3), 0)
    for view in (base[:, :, :, ::2], base[:, :, 1:7, 3:11], base[::2]):
        boxes, _ = fastuft.sample_boxes(len(view) // 2, *view.shape[2:], generator=torch.Generator().manual_seed(2))
        everywhere, _ = fastuft.sample_boxes(len(view), *view.shape[2:], generator=torch.Generator().manual_seed(2))
        partner = torch.arange(len(view)).flip(0)
        assert torch.equal(fastuft.cutmix(view, everywhere, partner), reference.cutmix(view, everywhere, partner))
        changed, untouched = base.clone(), base.clone()
        inner = changed.as_strided(view.shape, view.stride(), view.storage_offset())
        expected = view.clone()
        reference.cutmix_(expected, boxes)
        fastuft.cutmix_(inner, boxes)
        assert torch.equal(inner, expected)
        inner.copy_(view)
        assert torch.equal(changed, untouched), "a pixel outside the view was written"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3)], ids=str)
def test_outputs_larger_than_the_cache_are_exact(order):
    """Those are written by streaming stores, here at odd offsets; the sizes exceed any last-level cache in use."""
    side = 1501
    images = fill([6, 3, side, side], torch.float32, order, 0)
    boxes, lam = fastuft.sample_boxes(6, side, side, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([5, 4, 3, 3, 1, 0])
    assert torch.equal(fastuft.cutmix(images, boxes, partner), reference.cutmix(images, boxes, partner))
    assert torch.equal(fastuft.mixup(images, lam, partner), reference.mixup(images, lam, partner))


def test_in_place_writes_bump_the_version_counter():
    images = torch.rand(4, 3, 4, 4)
    weight = torch.rand(1, requires_grad=True)
    loss = (weight * images).sum()
    fastuft.cutmix_(images, BOX[:2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(not ops.HAS_CPU_EXTENSION, reason="the compiled extension _C is not built")
@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("cutmix", lambda: (BOX + 3, PARTNER)),
        ("cutmix", lambda: (BOX, PARTNER + 2)),
        ("cutmix_", lambda: (BOX[:2] - 1,)),
        ("mixup", lambda: (LAM * 3, PARTNER)),
        ("mixup", lambda: (LAM, PARTNER - 1)),
        ("mixup_", lambda: (LAM[:2] * float("nan"),)),
    ],
)
def test_operators_check_values(name, rest):
    """Compiled programs come without the Python side's checks of values."""
    images = torch.rand(4, 3, 4, 4)
    before = images.clone()
    with pytest.raises(RuntimeError, match=r"boxes|partner|lam"):
        getattr(torch.ops.fastuft, name)(images, *rest())
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cutmix", "cutmix_", "mixup", "mixup_"])
def test_opcheck(name, dtype):
    images = fill([4, 3, 5, 6], dtype, (0, 2, 3, 1), 0)
    boxes, lam = fastuft.sample_boxes(4, 5, 6, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([3, 2, 1, 0])
    in_place = name.endswith("_")
    if not in_place and dtype.is_floating_point:
        images.requires_grad_()
    arguments = {
        "cutmix": (images, boxes, partner),
        "cutmix_": (images, boxes[:2]),
        "mixup": (images, lam, partner),
        "mixup_": (images, lam[:2].clone()),
    }[name]
    torch.library.opcheck(getattr(torch.ops.fastuft, name), arguments)


def test_gradients():
    images = fill([4, 2, 3, 5], torch.float64, (0, 1, 2, 3), 0).requires_grad_()
    boxes, lam = fastuft.sample_boxes(4, 3, 5, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([1, 1, 0, 3])
    assert torch.autograd.gradcheck(lambda x: fastuft.cutmix(x, boxes, partner), images)
    assert torch.autograd.gradcheck(lambda x: fastuft.mixup(x, lam, partner), images)


def test_compiles_without_graph_breaks():
    images = fill([4, 3, 8, 8], torch.float32, (0, 2, 3, 1), 0)
    boxes, lam = fastuft.sample_boxes(4, 8, 8, generator=torch.Generator().manual_seed(0))
    partner = torch.tensor([3, 2, 1, 0])

    def mix(x):
        x = fastuft.cutmix(x, boxes, partner) + fastuft.mixup(x, lam, partner)
        fastuft.cutmix_(x, boxes[:2])
        return fastuft.mixup_(x, lam[:2].clone()).sum(1)

    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), mix(images))


BOX = torch.tensor([[0, 0, 2, 2]] * 4, dtype=torch.int32)
PARTNER = torch.tensor([1, 0, 3, 2])
LAM = torch.full((4,), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fastuft.cutmix(x[0], BOX, PARTNER), r"images is \(3, 4, 4\); it must be a tensor \[B, C, H, W\]"),
        (lambda x: fastuft.cutmix(x.int(), BOX, PARTNER), "images has dtype torch.int32; allowed: uint8"),
        (lambda x: fastuft.cutmix(x, BOX.long(), PARTNER), r"boxes is \(4, 4\) of torch.int64; it must be"),
        (lambda x: fastuft.cutmix(x, BOX[:2], PARTNER), r"boxes is \(2, 4\)"),
        (lambda x: fastuft.cutmix(x, BOX + 3, PARTNER), r"boxes\[0\]=\[3, 3, 5, 5\] does not fit images of 4 x 4"),
        (lambda x: fastuft.cutmix(x, BOX.flip(1), PARTNER), r"boxes\[0\]=\[2, 2, 0, 0\] does not fit"),
        (lambda x: fastuft.cutmix(x, BOX, PARTNER + 2), "partner has values from 2 to 5; allowed: 0 to 3"),
        (lambda x: fastuft.cutmix(x, BOX, PARTNER.int()), "partner is"),
        (lambda x: fastuft.cutmix_(x, BOX), r"boxes is \(4, 4\) of torch.int32; it must be a tensor \[2, 4\]"),
        (lambda x: fastuft.cutmix_(x.requires_grad_(), BOX[:2]), "images requires grad"),
        (lambda x: fastuft.cutmix_(x[:1].expand(4, 3, 4, 4), BOX[:2]), "overlaps itself in memory"),
        (lambda x: fastuft.mixup(x, LAM * 3, PARTNER), "lam has values from 1.5 to 1.5; allowed: 0 to 1"),
        (lambda x: fastuft.mixup(x, LAM.double(), PARTNER), "lam is"),
        (lambda x: fastuft.mixup(x, LAM.requires_grad_(), PARTNER), "lam requires grad"),
        (lambda x: fastuft.mixup_(x, torch.tensor([0.5, float("nan")])), "lam has values"),
        (lambda x: fastuft.mixup_(x, LAM), r"lam is \(4,\)"),
        (lambda x: fastuft.cutmix_(x, BOX, group=3), "group=3 does not divide the batch of 4 images"),
        (lambda x: fastuft.mixup_(x, LAM, group=0), "group=0 does not divide the batch of 4 images"),
        (lambda x: fastuft.cutmix_(x, BOX, group=2), r"boxes is \(4, 4\) of torch.int32; it must be a tensor \[2, 4\]"),
    ],
)
def test_bad_input_is_refused_before_any_write(call, message):
    LAM.requires_grad_(False)
    images = torch.rand(4, 3, 4, 4)
    before = images.clone()
    with pytest.raises(ValueError, match=message):
        call(images)
    LAM.requires_grad_(False)
    assert torch.equal(images.detach(), before)


@pytest.mark.parametrize(("alpha", "size"), [(1.0, (32, 32)), (0.2, (32, 32)), (1.0, (48, 20)), (0.2, (20, 48))])
def test_boxes_follow_the_definition(alpha, size):
    """Mean area against the definition, averaged over all centers; lam exactly the share that remains."""
    height, width = size
    boxes, lam = fastuft.sample_boxes(100_000, height, width, alpha, torch.Generator().manual_seed(0))
    top, left, bottom, right = boxes.long().unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= height).all() and (right <= width).all()
    area = (bottom - top) * (right - left)
    assert torch.equal(lam, (1 - area.double() / (height * width)).float())

    torch.manual_seed(0)
    concentration = torch.tensor(alpha, dtype=torch.float64)
    shares = torch.distributions.Beta(concentration, concentration).sample((200_000,))
    side = (1 - shares).sqrt()

    def covered(length):
        cut = (length * side).round()
        centers = torch.arange(length, dtype=torch.float64)
        start = centers[None] - torch.div(cut, 2, rounding_mode="floor")[:, None]
        return ((start + cut[:, None]).clamp(0, length) - start.clamp(0, length)).mean(1)

    expected = (covered(height) * covered(width)).mean() / (height * width)
    assert abs(float(area.double().mean()) / (height * width) - float(expected)) < 0.004


def test_boxes_are_reproducible_from_the_generator():
    generator = torch.Generator().manual_seed(3)
    fastuft.sample_boxes(5, 8, 8, 0.4, generator)
    state = generator.get_state()
    first = fastuft.sample_boxes(5, 8, 8, 0.4, generator)
    generator.set_state(state)
    second = fastuft.sample_boxes(5, 8, 8, 0.4, generator)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tiny_alpha_gives_no_nan():
    _, lam = fastuft.sample_boxes(1000, 16, 16, 1e-4, torch.Generator().manual_seed(0))
    assert lam.isfinite().all() and 0.3 < lam.mean() < 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 4, 4), "n=-1"), ((2, 0, 4), "height=0"), ((2, 4, 4, 0.0), "alpha=0.0 is out of range")],
)
def test_impossible_boxes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastuft.sample_boxes(*arguments)


def test_without_the_extension_the_reference_is_used(tmp_path):
    """A copy of the package without libraries warns once, says how to build, and computes the same."""
    import shutil
    import subprocess
    import sys
    from pathlib import Path

    root = Path(fastuft.__file__).parent
    shutil.copytree(root, tmp_path / "fastuft", ignore=shutil.ignore_patterns("*.so", "__pycache__"), symlinks=False)
    script = (
        "import warnings, torch, fastuft\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    x = torch.rand(4, 3, 4, 4); b = torch.tensor([[0, 0, 2, 2]] * 4, dtype=torch.int32)\n"
        "    y = fastuft.cutmix(x, b, torch.tensor([1, 0, 3, 2]))\n"
        "    fastuft.cutmix_(x, b[:2])\n"
        "texts = [str(w.message) for w in seen if 'extension' in str(w.message)]\n"
        "assert len(texts) == 1 and 'pip install' in texts[0], texts\n"
        "z = torch.rand(4, 3, 4, 4); z[:] = torch.arange(4.)[:, None, None, None]\n"
        "y = fastuft.cutmix(z, b, torch.tensor([1, 0, 3, 2]))\n"
        "assert (y[0, :, :2, :2] == 1).all() and (y[0, :, 2:] == 0).all() and (y[0, :, :2, 2:] == 0).all()\n"
        "print('ok', fastuft.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stderr


def gpu_case(name, order, seed):
    """(the mixing function of this name, its arguments on the GPU)."""
    generator = torch.Generator().manual_seed(seed)
    images = fill([8, 3, 32, 24], torch.float16, order, seed)
    rows = 4 if name.endswith("_") else 8
    boxes, lam = fastuft.sample_boxes(rows, 32, 24, generator=generator)
    partner = () if name.endswith("_") else (torch.randint(8, (8,), generator=generator),)
    arguments = (images, boxes if name.startswith("cutmix") else lam, *partner)
    return getattr(fastuft, name), [tensor.cuda() for tensor in arguments]


def expected_of(name, arguments):
    """What the plain reference makes of fresh arguments."""
    images, *rest = arguments
    if not name.endswith("_"):
        return getattr(reference, name)(images, *rest)
    mixed = images.clone()
    getattr(reference, name)(mixed, *rest)
    return mixed


@pytest.mark.gpu
class TestOnTheGpu:
    """The CUDA kernels; the reference on the same device is the truth."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)], ids=str)
    @pytest.mark.parametrize("size", [(6, 3, 32, 32), (5, 3, 31, 17), (4, 1, 224, 224)], ids=str)
    def test_bitwise(self, size, order, dtype):
        assert ops.HAS_CUDA_EXTENSION, "_C_cuda is not built or not loaded"
        images = fill(list(size), dtype, order, 0).cuda()
        generator = torch.Generator().manual_seed(0)
        boxes, lam = (t.cuda() for t in fastuft.sample_boxes(size[0], *size[2:], generator=generator))
        partner = torch.randint(size[0], (size[0],), generator=generator).cuda()
        half = size[0] // 2
        torch.cuda.set_sync_debug_mode("error")
        try:
            mixed = fastuft.cutmix(images, boxes, partner)
            blended = fastuft.mixup(images, lam, partner)
            swapped, paired = images.clone(), images.clone()
            fastuft.cutmix_(swapped, boxes[:half].contiguous())
            fastuft.mixup_(paired, lam[:half].contiguous())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(mixed, reference.cutmix(images, boxes, partner))
        expected = images.clone()
        reference.cutmix_(expected, boxes[:half])
        assert torch.equal(swapped, expected)
        assert torch.equal(blended, reference.mixup(images, lam, partner))
        expected = images.clone()
        reference.mixup_(expected, lam[:half])
        assert torch.equal(paired, expected)
        # and the bits of the CPU's operators
        assert torch.equal(blended.cpu(), fastuft.mixup(images.cpu(), lam.cpu(), partner.cpu()))

    def test_views_with_gaps_and_misaligned_starts_are_exact(self):
        base = torch.rand(6, 3, 40, 61, device="cuda")
        for view in (
            base[:, :, 1:, 3:],
            base[:, :, :, ::2],
            base[1:, :, ::3],
            torch.rand(43921, device="cuda")[1:].view(6, 3, 40, 61),
        ):
            boxes, lam = fastuft.sample_boxes(len(view), *view.shape[2:], generator=torch.Generator().manual_seed(0))
            half = len(view) // 2
            boxes, lam = boxes.cuda(), lam.cuda()
            partner = torch.arange(len(view), device="cuda").flip(0)
            assert torch.equal(fastuft.cutmix(view, boxes, partner), reference.cutmix(view, boxes, partner))
            expected = view.clone()
            reference.cutmix_(expected, boxes[:half])
            kept = base.clone()
            fastuft.cutmix_(view, boxes[:half])
            assert torch.equal(view, expected)
            base.copy_(kept)

    def test_current_stream_and_gradient_of_a_bad_partner(self):
        images = torch.rand(4, 3, 16, 16, device="cuda", requires_grad=True)
        boxes = torch.tensor([[0, 0, 4, 4]] * 4, dtype=torch.int32).cuda()
        partner = torch.tensor([99, 0, -1, 2]).cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fastuft.cutmix(images, boxes, partner).nansum().backward()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        assert images.grad.isfinite().all()

    def test_bad_values_give_nan_or_are_clamped(self):
        images = torch.rand(4, 3, 16, 16, device="cuda")
        boxes = torch.tensor([[0, 0, 4, 4], [-5, -5, 99, 99], [0, 0, 4, 4], [9, 9, 2, 2]], dtype=torch.int32).cuda()
        partner = torch.tensor([99, 0, -1, 2]).cuda()
        mixed = fastuft.cutmix(images, boxes, partner)
        assert mixed[0, :, :4, :4].isnan().all() and torch.equal(mixed[0, :, 4:], images[0, :, 4:])
        assert torch.equal(mixed[1], images[0]) and mixed[2, :, :4, :4].isnan().all()
        assert torch.equal(mixed[3], images[3])
        bytes_ = (images * 255).to(torch.uint8)
        assert (fastuft.cutmix(bytes_, boxes, partner)[0, :, :4, :4] == 0).all()
        lam = torch.tensor([0.5, 2.0, float("nan"), 1.0]).cuda()
        blended = fastuft.mixup(images, lam, torch.tensor([1, 0, 3, 2]).cuda())
        assert blended[1].isnan().all() and blended[2].isnan().all() and blended[0].isfinite().all()

    @pytest.mark.parametrize("name", ["cutmix", "cutmix_", "mixup", "mixup_"])
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=str)
    def test_a_captured_graph_replays_on_new_inputs(self, name, order):
        """Replayed on other images, boxes, weights and partners than it was captured with."""
        mix, static = gpu_case(name, order, seed=0)
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            mix(*static)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mixed = mix(*static)
        for seed in (1, 2):
            _, fresh = gpu_case(name, order, seed)
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
            graph.replay()
            assert torch.equal(mixed, expected_of(name, fresh))

    @pytest.mark.parametrize("name", ["cutmix", "cutmix_", "mixup", "mixup_"])
    def test_runs_on_the_current_stream(self, name):
        """Inputs that a side stream makes late: work on any other stream would read them too early."""
        mix, made = gpu_case(name, (0, 2, 3, 1), seed=0)
        late = [torch.zeros_like(tensor) for tensor in made]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for old, new in zip(late, made, strict=True):
                old.copy_(new)
            mixed = mix(*late)
        stream.synchronize()
        assert torch.equal(mixed, expected_of(name, made))
