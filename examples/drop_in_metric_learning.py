"""pytorch-metric-learning: ``NTXentLoss`` with explicit index tuples over keys and a queue of negatives.

::

    -   from pytorch_metric_learning.losses import NTXentLoss
    +   from fastuft import InfoNCELoss

    -   criterion = NTXentLoss(temperature=0.1)
    +   criterion = InfoNCELoss(temperature=0.1)
        ...
    -   rows = torch.arange(B)
    -   pairs = (rows, rows, rows.repeat_interleave(K), B + torch.arange(K).repeat(B))
    -   loss = criterion(query, indices_tuple=pairs, ref_emb=torch.cat([key, queue]))
    +   loss = criterion(query, key, queue)

The index tuples hold 2 B K integers, and the original a [B, B K] matrix; neither is needed.
"""

from __future__ import annotations

import torch
from torch import nn

from fastuft import InfoNCELoss, KeyQueue

try:
    from pytorch_metric_learning.losses import NTXentLoss as TheirLoss
except ImportError:
    TheirLoss = None


def main() -> None:
    batch_size, keys, dim = 50, 200, 32
    encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, dim))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    criterion, queue = InfoNCELoss(temperature=0.1), KeyQueue(keys, dim)
    images = torch.randn(256, 64)
    for step in range(8):
        batch = images[torch.randperm(len(images))[:batch_size]]
        query = encoder(batch + 0.1 * torch.randn_like(batch))
        key = encoder(batch + 0.1 * torch.randn_like(batch)).detach()
        loss = criterion(query, key, queue.keys)
        if TheirLoss is not None:
            rows = torch.arange(batch_size)
            pairs = (rows, rows, rows.repeat_interleave(keys), batch_size + torch.arange(keys).repeat(batch_size))
            original = TheirLoss(temperature=0.1)(query, indices_tuple=pairs, ref_emb=torch.cat([key, queue.keys]))
            torch.testing.assert_close(loss, original)
        queue.enqueue_(key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
