"""The demo's runs: pretraining on glyphs, finetuning each arm on digits, and evaluating each.

Every arm is a plain :class:`fastuft.config.TrainConfig` that is written into its run folder, so
``fastuft finetune --config RUN/config.yaml`` repeats it.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastuft.config import (
    ClusteringConfig,
    DataConfig,
    EvalConfig,
    FewShotConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from fastuft.data import SMALL_IMAGES, labeled_folder
from fastuft.demo.images import DemoFolders
from fastuft.evaluate import clustering_accuracy, evaluate_backbone, retrieval_accuracy, write_evaluation
from fastuft.model import load_backbone
from fastuft.runfolder import RunFolder, write_json
from fastuft.trainer import train

MODEL = ModelConfig(arch="resnet_tiny", stem="small", head_dim=64, bn="plain")
METHOD = MethodConfig(queue_size=2048, key_momentum=0.99, mix="none")
RUNTIME = RuntimeConfig(tensorboard=False)
DATA = DataConfig(batch_size=128, threads=1)  # other runs use the other processors
PRETRAIN_LR, FINETUNE_LR = 0.12, 0.06
# The paper's 3.0 for the classifier suits ResNet-50. For this network, the rate was chosen among 3, 1, 0.3 and 0.1 by the
# pretrained backbone's accuracy on held-out training digits, without using test digits.
FEWSHOT_LR = 1.0

PRETRAINED, RAW_PIXELS = "pretrained", "raw pixels"
# (source replayed, mixing, steps matched to the replay arm's)
ARMS = {
    "naive": (False, False, False),
    "naive, same steps as + SDR": (False, False, True),
    "+ SDR": (True, False, False),
    "+ Mix without SDR": (False, True, False),
    "+ SDR + Mix": (True, True, False),
}


@dataclass(frozen=True)
class Demo:
    """A demo's settings and its runs below ``root``; finished runs are not repeated.

    Args:
        root: folder of everything.
        folders: the images.
        pretrain_epochs: epochs on the source.
        finetune_epochs: epochs of each arm.
        shots: labeled images per class of the few-shot runs.
        trials: draws per few-shot figure.
    """

    root: Path
    folders: DemoFolders
    pretrain_epochs: int
    finetune_epochs: int
    shots: tuple[int, ...]
    trials: int

    def folder(self, seed: int, name: str) -> Path:
        """The run folder of an arm, of the pretraining or of the raw pixels."""
        return self.root / f"seed{seed}" / "_".join(re.findall(r"\w+", name.replace("+", " plus ")))

    def train(self, seed: int, name: str) -> None:
        """Train the network from which all arms of this seed start, or train an arm from it."""
        init, out = self.folder(seed, PRETRAINED), self.folder(seed, name)
        if name == PRETRAINED:
            _train(pretrain_config(self.folders, out, seed, self.pretrain_epochs))
        else:
            _train(arm_config(name, self.folders, init, out, seed, self.finetune_epochs))

    def evaluate(self, seed: int, name: str) -> None:
        """Evaluate a run's backbone and compare it with the pretrained one; figures go into the run folder."""
        run, before = self.folder(seed, name), self.folder(seed, PRETRAINED)
        if RunFolder(run).evaluation_file.exists():
            return
        config = EvalConfig(
            checkpoint=str(run),
            before=str(before),
            train=self.folders.train,
            test=self.folders.test,
            source=self.folders.source,
            out=str(run),
            size=SMALL_IMAGES.size,
            resize=SMALL_IMAGES.size,
            trials=self.trials,
            fewshot=FewShotConfig(shots=list(self.shots), lr=FEWSHOT_LR, crop_scale=(1.0, 1.0), flip_p=0.0),
            clustering=ClusteringConfig(restarts=3),
            cache=str(self.root / "features"),  # the pretrained backbone's features serve every arm
            seed=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = evaluate_backbone(load_backbone(run), config, load_backbone(before) if run != before else None)
        write_evaluation(run, result)

    def evaluate_pixels(self, seed: int) -> None:
        """Write the figures of the raw pixels into their own folder."""
        out = RunFolder(self.folder(seed, RAW_PIXELS))
        if out.evaluation_file.exists():
            return
        out.path.mkdir(parents=True, exist_ok=True)
        write_json(out.evaluation_file, raw_pixels(self.folders, seed))


def pretrain_config(folders: DemoFolders, out: Path, seed: int, epochs: int) -> TrainConfig:
    """MoCoV2 pretraining of the small network on the glyphs."""
    return TrainConfig(
        target=folders.source,
        out=str(out),
        seed=seed,
        model=MODEL,
        method=METHOD,
        augment=SMALL_IMAGES,
        data=DATA,
        optim=OptimConfig(lr=PRETRAIN_LR, epochs=epochs),
        runtime=RUNTIME,
        resume="auto",
    )


def arm_config(arm: str, folders: DemoFolders, init: Path, out: Path, seed: int, epochs: int) -> TrainConfig:
    """Finetuning on the digits from the pretrained run."""
    replay, mix, matched = ARMS[arm]
    if matched:
        # A pass over the target alone has fewer steps than one over target and source, so more passes match the steps.
        targets = len(labeled_folder(folders.train)[0])
        sources = round(DATA.replay_fraction * len(labeled_folder(folders.source)[0]))
        epochs = round(epochs * ((targets + sources) // DATA.batch_size) / (targets // DATA.batch_size))
    return TrainConfig(
        target=folders.train,
        source=folders.source if replay else None,
        init=str(init),
        out=str(out),
        seed=seed,
        model=MODEL,
        method=dataclasses.replace(METHOD, mix="cutmix" if mix else "none"),
        augment=SMALL_IMAGES,
        data=DATA,
        optim=OptimConfig(lr=FINETUNE_LR, epochs=epochs),
        runtime=RUNTIME,
        resume="auto",
    )


def raw_pixels(folders: DemoFolders, seed: int) -> dict[str, float]:
    """Retrieval and clustering of the images themselves, which a representation has to beat."""

    def pixels(folder: str) -> tuple[np.ndarray, list[int]]:
        paths, labels, _ = labeled_folder(folder)
        rows = [np.asarray(Image.open(path).convert("L"), np.float32).ravel() / 255 for path in paths]
        return np.stack(rows), labels

    (train_x, train_y), (test_x, test_y) = pixels(folders.train), pixels(folders.test)
    return {
        "retrieval": retrieval_accuracy(train_x, train_y, test_x, test_y),
        "clustering": clustering_accuracy(train_x, train_y, restarts=3, seed=seed),
    }


def _train(config: TrainConfig) -> None:
    with warnings.catch_warnings():
        # The queue is larger than this small training set on purpose; a user's own run gets the warning.
        warnings.filterwarnings("ignore", message="method.queue_size")
        result = train(config)
    if result.interrupted:
        raise SystemExit(f"stopped by {result.interrupted}; run the demo again to continue")
