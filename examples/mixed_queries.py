"""Mixed queries with two positives each (Li et al. 2021, Eq. 5 and 6) inside an ordinary training loop.

::

    +   from fastuft import MixedInfoNCELoss, mixup
    +   mixed_criterion = MixedInfoNCELoss(temperature=0.2)
        ...
        loss = criterion(encoder(view_q), key, queue.keys)
    +   mixed = mixup(view_q, lam, partner)              # or cutmix(view_q, boxes, partner)
    +   loss = loss + mixed_criterion(encoder(mixed), key, key[partner], lam, queue.keys)
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastuft import InfoNCELoss, KeyQueue, MixedInfoNCELoss, mixup


def main() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32))
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    criterion, mixed_criterion, queue = InfoNCELoss(), MixedInfoNCELoss(), KeyQueue(1000, 32)
    images = torch.randn(512, 3, 8, 8)
    for step in range(8):
        batch = images[torch.randperm(len(images))[:100]]
        view_q, view_k = (batch + 0.1 * torch.randn_like(batch) for _ in range(2))
        with torch.no_grad():
            for p_q, p_k in zip(encoder.parameters(), key_encoder.parameters(), strict=True):
                p_k.lerp_(p_q, 0.01)
            key = key_encoder(view_k)
        partner, lam = torch.randperm(100), torch.rand(100)
        clean = criterion(encoder(view_q), key, queue.keys)
        mixed = mixed_criterion(encoder(mixup(view_q, lam, partner)), key, key[partner], lam, queue.keys)
        queue.enqueue_(key)
        optimizer.zero_grad()
        (clean + mixed).backward()
        optimizer.step()
        print(f"step {step}: loss {clean.item():.4f} + {mixed.item():.4f}")


if __name__ == "__main__":
    main()
