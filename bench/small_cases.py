"""Every CUDA path of the losses and of mixing once, at small and odd sizes: what compute-sanitizer watches.

``compute-sanitizer --tool memcheck python bench/small_cases.py``; ``gpu_suite.sh`` does it.
"""

from __future__ import annotations

import sys

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


def run_mixing(device: torch.device) -> None:
    """CutMix and MixUp, both forms, both layouts, element sizes 1 to 4; boxes at the borders and empty ones."""
    height, width = 19, 23
    boxes = torch.tensor(
        [[0, 0, height, width], [3, 5, 4, 6], [7, 7, 7, 9], [0, 20, height, width]], dtype=torch.int32, device=device
    )
    partner = torch.tensor([3, 2, 1, 0], device=device)
    lam = torch.rand(4, device=device)
    for dtype in (torch.float32, torch.float16, torch.uint8):
        images = torch.randint(0, 255, (4, 3, height, width), device=device).to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            batch = images.contiguous(memory_format=layout)
            fastuft.cutmix(batch, boxes, partner)
            fastuft.cutmix_(batch.clone(), boxes[:2])
            if dtype.is_floating_point:
                fastuft.mixup(batch, lam, partner)
                fastuft.mixup_(batch.clone(), lam[:2])


def main() -> None:
    """Run the cases on the GPU, or on the CPU's paths where there is none."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_losses(device, "triton" if device.type == "cuda" else "torch")
    run_queue(device)
    run_mixing(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"small cases ran on {device}")


if __name__ == "__main__":
    main()
