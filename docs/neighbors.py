"""Draw the README's picture from a finished demo: ``python docs/neighbors.py runs/demo``.

For the first test image of each class: its nearest training images by the pretrained network of seed 0 and by the
one finetuned with replaying and mixing. The images are not selected: they are the first by name.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from fastuft.evaluate import nearest_neighbors
from fastuft.model import load_backbone

CLASSES, NEIGHBORS = 10, 5
OUT = Path(__file__).parent / "images" / "neighbors.png"


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images [N, 32, 32, 3] uint8, classes [N]) of class folders, in order of their names."""
    paths = sorted(folder.rglob("*.png"))
    classes = [path.parent.name for path in paths]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]), np.array(classes)


@torch.inference_mode()
def features(checkpoint: Path, images: np.ndarray) -> np.ndarray:
    """[N, num_features] of images by a checkpoint's backbone."""
    backbone = load_backbone(str(checkpoint)).eval()
    batch = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (backbone.mean, backbone.std))
    return backbone.features((batch - mean) / std).numpy()


def main(demo: Path) -> None:
    """Write the picture of one demo folder."""
    train, train_classes = read(demo / "images" / "train")
    test, test_classes = read(demo / "images" / "test")
    queries = [int(np.argmax(test_classes == name)) for name in sorted(set(test_classes))[:CLASSES]]
    folders = {"pretrained": "pretrained", "+ SDR + Mix": "plus_SDR_plus_Mix"}
    figure, axes = plt.subplots(CLASSES, 2 * (NEIGHBORS + 1), figsize=(9, 7.2))
    for panel, arm in enumerate(folders):
        folder = demo / "seed0" / folders[arm]
        gallery, wanted = features(folder, train), features(folder, test[queries])
        nearest = nearest_neighbors(wanted, gallery, NEIGHBORS)[1].numpy()
        for row, query in enumerate(queries):
            shown = [test[query], *train[nearest[row]]]
            wrong = [False, *(train_classes[nearest[row]] != test_classes[query])]
            for column, (image, other) in enumerate(zip(shown, wrong, strict=True)):
                cell = axes[row, panel * (NEIGHBORS + 1) + column]
                cell.imshow(image)
                cell.set(xticks=[], yticks=[])
                for spine in cell.spines.values():
                    spine.set(color="#c44e52" if other else "#dddddd", linewidth=3 if other else 0.5)
        axes[0, panel * (NEIGHBORS + 1)].set_title("before" if panel == 0 else "after", loc="left", fontsize=10)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=110, bbox_inches="tight")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
