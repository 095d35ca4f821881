"""Images that come late: the default pool hides 50 ms per image."""

from __future__ import annotations

import time

import pytest
import torch
from stream_cases import plain

from fastuft.data import EvalStream
from fastuft.data.files import Files
from fastuft.data.images import Images, Located


class Distant(Files):
    """Files that answer after 50 ms, as objects of another building do."""

    plain, remote = False, True

    def path(self, row):
        return Located(self.paths[row], self, row)

    def read(self, row):
        time.sleep(0.05)
        return super().read(row)


def views(paths, loader):
    stream = EvalStream(paths, loading=plain(loader, threads=1), size=128, batch_size=32)
    begin = time.perf_counter()
    found = torch.cat([views for views, _ in stream])
    seconds = time.perf_counter() - begin
    stream.close()
    return found, len(found) / seconds


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_read_ahead_hides_a_latency_of_50_ms(jpegs, loader):
    """Printed: the ratio of the rates, of the fastest of four alternating rounds each, with the wait for the first batch."""
    local = list(jpegs.paths) * 40
    distant = Images.of([Distant(local, local)])
    rates = {"local": 0.0, "distant": 0.0}
    for _ in range(4):
        for name, paths in (("local", local), ("distant", distant)):
            found, rate = views(paths, loader)
            rates[name] = max(rates[name], rate)
            if name == "local":
                expected = found
        assert torch.equal(found, expected)
    ratio = rates["distant"] / rates["local"]
    print(f"{loader}: {rates['local']:.0f} local, {rates['distant']:.0f} distant images/s, {ratio:.3f}")
    assert ratio > 0.85
