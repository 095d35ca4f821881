"""The step-time model of docs/scaling.md: ``python docs/scaling.py`` prints its table.

Every input is a count, a figure from a data sheet, or an assumption that is marked as one. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

PARAMETERS = 23_508_032 + 4_458_624  # ResNet-50 and its two-layer head, counted
VIEW_BYTES = 3 * 224 * 224 * 2  # one view in half precision
KEY_BYTES = 128 * 4  # one key
QUEUE_BYTES = 65_536 * KEY_BYTES
NODE = 8  # GPUs


@dataclass(frozen=True)
class Cluster:
    """Inputs that depend on the machine.

    Args:
        within: bytes per second that a GPU sends to the others of its node.
        between: bytes per second that a GPU sends to other nodes.
        images: images per second and GPU, including both passes and the keys.
        batch: images per GPU.
        disk: bytes per second to the run folder.
    """

    within: float = 450e9  # NVLink 4, data sheet, one direction
    between: float = 50e9  # one 400 Gb/s adapter per GPU, data sheet
    images: float = 1500.0  # an assumption, see the page
    batch: int = 128
    disk: float = 1e9  # an assumption

    def bandwidth(self, gpus: int) -> float:
        """Bytes per second of the slowest link that a collective over this many GPUs uses."""
        return self.within if gpus <= NODE else self.between

    def compute(self) -> float:
        """Seconds of a step without any communication."""
        return self.batch / self.images

    def gradients(self, gpus: int) -> float:
        """Seconds of the ring all-reduce of fp32 gradients, which overlaps the backward pass."""
        return 2 * (gpus - 1) / gpus * 4 * PARAMETERS / self.bandwidth(gpus)

    def views(self, gpus: int) -> float:
        """Seconds of the exchange of key views (ShuffleBN): all to all, before the key encoder, not overlapped."""
        return (gpus - 1) / gpus * self.batch * VIEW_BYTES / self.bandwidth(gpus)

    def keys(self, gpus: int) -> float:
        """Seconds of the gather of keys, not overlapped."""
        return (gpus - 1) * self.batch * KEY_BYTES / self.bandwidth(gpus)

    def efficiency(self, gpus: int, hidden: float) -> float:
        """Share of a step spent computing, if the share ``hidden`` of the all-reduce overlaps the backward pass."""
        waits = (1 - hidden) * self.gradients(gpus) + self.views(gpus) + self.keys(gpus)
        return self.compute() / (self.compute() + waits)

    def checkpoint(self) -> float:
        """Seconds to write one checkpoint: both encoders, the momentum of SGD, the queue. The step waits for it."""
        return (3 * 4 * PARAMETERS + QUEUE_BYTES) / self.disk


def table(cluster: Cluster) -> str:
    """The page's table, in Markdown."""
    lines = [
        "| GPUs | all-reduce, ms | exchange of views, ms | gather of keys, ms | computing, none hidden | all-reduce hidden |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for gpus in (8, 16, 32, 64):
        parts = [1e3 * part(gpus) for part in (cluster.gradients, cluster.views, cluster.keys)]
        shares = [100 * cluster.efficiency(gpus, hidden) for hidden in (0, 1)]
        cells = [f"{part:.2f}" for part in parts] + [f"{share:.1f} %" for share in shares]
        lines.append(f"| {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Cluster()))
    print(f"step {1e3 * Cluster().compute():.0f} ms, checkpoint {Cluster().checkpoint():.2f} s")
