"""facebookresearch/moco: the logits, the clone of the queue and the cross-entropy become one call.

In ``moco/builder.py``::

    +   from fastuft import KeyQueue, info_nce
        ...
    -   self.register_buffer("queue", torch.randn(dim, K))
    -   self.queue = nn.functional.normalize(self.queue, dim=0)
    -   self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    +   self.queue = KeyQueue(K, dim, gather_distributed=True)
        ...
    -   q = nn.functional.normalize(q, dim=1)
        ...
    -       k = nn.functional.normalize(k, dim=1)
        ...
    -   l_pos = torch.einsum('nc,nc->n', [q, k]).unsqueeze(-1)
    -   l_neg = torch.einsum('nc,ck->nk', [q, self.queue.clone().detach()])
    -   logits = torch.cat([l_pos, l_neg], dim=1)
    -   logits /= self.T
    -   labels = torch.zeros(logits.shape[0], dtype=torch.long).cuda()
    -   self._dequeue_and_enqueue(k)
    -   return logits, labels
    +   loss = info_nce(q, k, self.queue.keys, self.T)
    +   self.queue.enqueue_(k)
    +   return loss

Any batch size may be enqueued, K need not be a multiple of it, and no step waits for the GPU.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastuft import KeyQueue, info_nce


class MoCo(nn.Module):
    """The builder with the change above."""

    def __init__(self, encoder: nn.Module, dim: int, K: int = 4096, m: float = 0.99, T: float = 0.07) -> None:
        super().__init__()
        self.m, self.T = m, T
        self.encoder_q, self.encoder_k = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.queue = KeyQueue(K, dim, gather_distributed=True)

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        q = self.encoder_q(im_q)
        with torch.no_grad():
            for p_q, p_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                p_k.lerp_(p_q, 1 - self.m)
            k = self.encoder_k(im_k)
        loss = info_nce(q, k, self.queue.keys, self.T)
        self.queue.enqueue_(k)
        return loss


def logits_and_cross_entropy(q: Tensor, k: Tensor, queue: Tensor, T: float) -> Tensor:
    """The original computation, for comparison; its queue is [dim, K]."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    l_neg = torch.einsum("nc,ck->nk", q, queue.clone().detach())
    logits = torch.cat([l_pos, l_neg], dim=1) / T
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def main() -> None:
    model = MoCo(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), dim=32)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.1)
    images = torch.randn(512, 64)
    for step in range(8):
        batch = images[torch.randperm(len(images))[:100]]
        views = [batch + 0.1 * torch.randn_like(batch) for _ in range(2)]
        with torch.no_grad():
            q, k = model.encoder_q(views[0]), model.encoder_k(views[1])
            original = logits_and_cross_entropy(q, k, model.queue.keys.T, model.T)
            torch.testing.assert_close(info_nce(q, k, model.queue.keys, model.T), original)
        loss = model(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
