"""lightly: ``NTXentLoss`` with a memory bank, replaced by changing its import.

::

    -   from lightly.loss import NTXentLoss
    +   from fastuft.loss.lightly import NTXentLoss

        criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))
        ...
        loss = criterion(query, key)

The bank is in ``criterion.state_dict()``, so a run that resumes keeps its negatives, and a batch that wraps around the
end of the bank loses no rows.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastuft.loss.lightly import NTXentLoss

try:
    from lightly.loss import NTXentLoss as TheirLoss
except ImportError:
    TheirLoss = None


def main() -> None:
    encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(1000, 32))
    if TheirLoss is not None:
        theirs = TheirLoss(temperature=0.1, memory_bank_size=(1000, 32))
        theirs.memory_bank.bank.copy_(criterion.memory_bank.keys)
    images = torch.randn(512, 64)
    for step in range(8):
        batch = images[torch.randperm(len(images))[:100]]
        query = encoder(batch + 0.1 * torch.randn_like(batch))
        with torch.no_grad():
            for p_q, p_k in zip(encoder.parameters(), key_encoder.parameters(), strict=True):
                p_k.lerp_(p_q, 0.01)
            key = key_encoder(batch + 0.1 * torch.randn_like(batch))
        loss = criterion(query, key)
        if TheirLoss is not None:
            torch.testing.assert_close(loss, theirs(query, key))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
