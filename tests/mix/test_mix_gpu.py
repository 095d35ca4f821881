"""CutMix and MixUp on a GPU: values against the plain reference, streams, graphs and bad values."""

from __future__ import annotations

import pytest
import torch
from mix_cases import DTYPES, fill

import fastuft
from fastuft.mix import ops, reference


def gpu_case(name, order, seed):
    """(the mixing function with this name, its arguments on the GPU)."""
    generator = torch.Generator().manual_seed(seed)
    images = fill([8, 3, 32, 24], torch.float16, order, seed)
    rows = 4 if name.endswith("_") else 8
    boxes, lam = fastuft.sample_boxes(rows, 32, 24, generator=generator)
    partner = () if name.endswith("_") else (torch.randint(8, (8,), generator=generator),)
    arguments = (images, boxes if name.startswith("cutmix") else lam, *partner)
    return getattr(fastuft, name), [tensor.cuda() for tensor in arguments]


def expected_of(name, arguments):
    """The result of the plain reference on new arguments."""
    images, *rest = arguments
    if not name.endswith("_"):
        return getattr(reference, name)(images, *rest)
    mixed = images.clone()
    getattr(reference, name)(mixed, *rest)
    return mixed


@pytest.mark.gpu
class TestOnTheGpu:
    """The CUDA kernels, compared with the reference on the same device."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)], ids=str)
    @pytest.mark.parametrize("size", [(6, 3, 32, 32), (5, 3, 31, 17), (4, 1, 224, 224)], ids=str)
    def test_values_equal_the_reference_bitwise(self, size, order, dtype):
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
        """The graph replays on other images, boxes, weights and partners than those of the capture."""
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
        """A side stream writes the inputs late; a kernel on any other stream would read them too early."""
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
