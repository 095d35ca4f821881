"""Runs every CUDA path of the losses and of mixing once, at small and odd sizes, under compute-sanitizer.

``compute-sanitizer --tool memcheck python bench/small_cases.py``; ``gpu_suite.sh`` does it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

import fastuft


def run_losses(device: torch.device, impl: str) -> None:
    """Both losses, forward and backward, and the primitive; sizes that no block divides."""
    for rows, keys, width in ((1, 1, 16), (3, 130, 64), (33, 257, 128), (17, 0, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
            k_a, k_b = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
            queue = torch.nn.functional.normalize(torch.randn(keys, width, device=device), dim=1)
            lam = torch.rand(rows, device=device)
            loss = fastuft.info_nce(q, k_a, queue, impl=impl) + fastuft.mixed_info_nce(
                q, k_a, k_b, lam, queue, impl=impl
            )
            loss.backward()
            fastuft.queue_lse(q.detach(), queue, impl=impl)
            if not (torch.isfinite(loss) and torch.isfinite(q.grad).all()):
                sys.exit(f"not finite: rows {rows}, keys {keys}, width {width}, {dtype}")


def run_queue(device: torch.device) -> None:
    """Enqueue batches that wrap, and one larger than the queue."""
    queue = fastuft.KeyQueue(37, 48).to(device)
    for rows in (5, 36, 37, 100):
        queue.enqueue_(torch.randn(rows, 48, device=device))


def mixed_layouts(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """The images in both layouts, and as views: cropped, with gaps, and starting off the 16 bytes of a vector."""
    yield images
    yield images.contiguous(memory_format=torch.channels_last)
    yield images[:, :, 1:, 3:]
    yield images[:, :, :, ::2]
    shifted = torch.empty(images.numel() + 1, dtype=images.dtype, device=images.device)[1:].view(images.shape)
    yield shifted.copy_(images)


def run_mixing(device: torch.device) -> None:
    """Every form, layout and dtype of mixing; rows that vectors divide and rows they do not; borders, empty boxes."""
    partner = torch.tensor([3, 3, 1, 0, 4], device=device)
    lam = torch.tensor([0.0, 1.0, 0.25, 0.7, 0.5], device=device)
    for height, width in ((19, 23), (5, 32)):
        for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            whole = torch.randint(0, 255, (5, 3, height, width), device=device).to(dtype)
            for images in mixed_layouts(whole):
                h, w = images.shape[2:]
                rows = [[0, 0, h, w], [1, 2, 3, 4], [2, 2, 2, 5], [0, w - 3, h, w], [h - 1, 0, h, w - 1]]
                boxes = torch.tensor(rows, dtype=torch.int32, device=device)
                fastuft.cutmix(images, boxes, partner)
                fastuft.mixup(images, lam, partner)
                for half in (boxes[:2], boxes[3:]):
                    fastuft.cutmix_(images, half)
                fastuft.mixup_(images, lam[2:4])


def run_bad_mixing(device: torch.device) -> None:
    """Boxes, partners and weights out of range: on a GPU nothing checks them, and nothing may leave the batch."""
    furthest = 2**31 - 1
    boxes = torch.tensor(
        [[-5, -5, 99, 99], [9, 9, 2, 2], [-furthest, 0, furthest, furthest], [furthest, 0, -furthest, 4]],
        dtype=torch.int32,
        device=device,
    )
    partner = torch.tensor([99, -1, 2**62, -(2**62)], device=device)
    lam = torch.tensor([-1.0, 2.0, float("nan"), float("inf")], device=device)
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        images = torch.randint(0, 255, (4, 3, 16, 16), device=device).to(dtype)
        for batch in (images, images.contiguous(memory_format=torch.channels_last), images[..., 1:]):
            fastuft.cutmix(batch, boxes, partner)
            fastuft.mixup(batch, lam, partner)
            fastuft.cutmix_(batch, boxes[:2])
            fastuft.cutmix_(batch, boxes[2:])
            fastuft.mixup_(batch, lam[:2])


def main() -> None:
    """Run the cases on the GPU, or on the CPU's paths where there is none."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_losses(device, "triton" if device.type == "cuda" else "torch")
    run_queue(device)
    run_mixing(device)
    if device.type == "cuda":
        run_bad_mixing(device)  # a CPU refuses them
        torch.cuda.synchronize()
    print(f"small cases ran on {device}")


if __name__ == "__main__":
    main()
