"""Do the discriminators know which regions of a pseudo label are right? Of one trained RRN trial, on the mixed images of its training.

    python benchmarks/region_maps.py STORE SWEEP TRIAL --data-root CAMVID --out benchmarks/results/region_maps

The newest checkpoint of the trial; branches normalise over the batch, as in training; the discriminators' dropout is off. Writes OUT.md and
OUT.png (rows: images; columns: image, true labels, prediction of branch 1, where it is right, score of D1, score of D2).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from orchestration.manifest import read_manifest
from orchestration.spec import build_config
from orchestration.store import open_store
from rrn_core import Runtime, TrainConfig
from rrn_core.data import DataSet, open_dataset
from rrn_core.data.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from rrn_core.data.batches import Batches
from rrn_core.losses import VOID, hard_labels
from rrn_core.networks import Quartet, build_quartet
from rrn_core.step import Mixed, discriminator_pairs, mixed_pass

BATCHES = 40
FIRST = 10_000_000
"""Batches that no training of this length has seen in this composition."""


def main() -> None:
    """Read, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("store", "sweep", "trial"):
        parser.add_argument(name)
    parser.add_argument("--data-root", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    label, config, quartet, data = opened(arguments.store, arguments.sweep, arguments.trial, arguments.data_root)
    batches = Batches(config, data)
    rows, pictures = [], []
    with torch.no_grad():
        for i in range(BATCHES):
            seen, picture = judged(quartet, batches[FIRST + i], config, data)
            rows += seen
            pictures += picture[:1] if i < 5 else []
    text = report(np.array(rows), config, f"{arguments.sweep}, {label}")
    arguments.out.with_suffix(".md").write_text(text)
    cv2.imwrite(str(arguments.out.with_suffix(".png")), np.concatenate(pictures)[..., ::-1])
    print(text)


def opened(store_uri: str, sweep: str, trial: str, data_root: Path) -> tuple[str, TrainConfig, Quartet, DataSet]:
    """Label, settings, networks and data of a trial's newest checkpoint."""
    store = open_store(store_uri)
    manifest = read_manifest(store, sweep, trial)
    assert manifest is not None, f"{sweep}/{trial}: not in {store_uri}"
    config = build_config(manifest.config)
    data = open_dataset(config, Runtime(data_root=data_root.resolve()))
    quartet = build_quartet(config, len(data.classes))
    quartet.load_state_dict(load(store.read(manifest.checkpoints[-1].objects["model.safetensors"].key)[0]))
    for judge in quartet.discriminators():
        judge.eval()
    return manifest.label, config, quartet, data


def judged(quartet: Quartet, batch: Batch, config: TrainConfig, data: DataSet) -> tuple[list[list[float]], list[NDArray[np.uint8]]]:
    """For every region with known labels: branch, share of right pixels, score of the own and of the other discriminator; and pictures."""
    mixed = mixed_pass(quartet.branch1, quartet.branch2, batch)
    pairs = discriminator_pairs(mixed, batch, config)
    d1, d2 = quartet.discriminators()
    rows: list[list[float]] = []
    scores: list[Tensor] = []
    for branch, (z, pair, own, other) in enumerate(((mixed.z1, pairs.predicted1, d1, d2), (mixed.z2, pairs.predicted2, d2, d1)), start=1):
        mine, cross = own(pair)[0].sigmoid(), other(pair)[0].sigmoid()
        known = (mixed.hidden != VOID).float()
        right = (hard_labels(z) == mixed.hidden).float() * known
        cells = mine.shape[-2:]
        seen, hit = (F.adaptive_avg_pool2d(maps.unsqueeze(1), cells) for maps in (known, right))
        usable = seen > 0.2
        columns = [(hit / seen.clamp(min=1e-6))[usable], mine[usable], cross[usable]]
        rows += [[branch, *values] for values in torch.stack(columns, dim=1).tolist()]
        scores += [mine, cross] if branch == 1 else []
    return rows, list(pictures(mixed, scores, data))


def pictures(mixed: Mixed, scores: list[Tensor], data: DataSet) -> Iterator[NDArray[np.uint8]]:
    """One row of panels an image."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(data.palette)] = data.palette
    size = mixed.image.shape[-2:]
    maps = [F.interpolate(score, size=size, mode="bilinear", align_corners=True)[:, 0] for score in scores]
    predicted = hard_labels(mixed.z1)
    pixels = mixed.image * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    for i, image in enumerate(pixels):
        right = np.where(mixed.hidden[i] == VOID, 128, 255 * (predicted[i] == mixed.hidden[i]).numpy()).astype(np.uint8)
        grey = [right, *((255 * m[i]).numpy().astype(np.uint8) for m in maps)]
        yield np.concatenate(
            [
                (image.permute(1, 2, 0).numpy().clip(0, 1) * 255).astype(np.uint8),
                palette[mixed.hidden[i].numpy()],
                palette[predicted[i].numpy()],
                *(np.repeat(panel[..., None], 3, axis=2) for panel in grey),
            ],
            axis=1,
        )


def report(rows: NDArray[np.float64], config: TrainConfig, trial: str) -> str:
    """Correlation of score and truth, and what thresholds select."""
    percentiles = " / ".join(f"{q:.2f}" for q in np.percentile(rows[:, 2], (5, 50, 95)))
    lines = [
        f"# Region maps of {trial}",
        "",
        f"{len(rows)} regions of {BATCHES} batches of mixed unlabelled training images, both branches; eps of the training {config.eps:g}.",
        "right: share of a region's known pixels that the branch labels rightly, in percent.",
        "",
        f"- right over all regions: {100 * rows[:, 1].mean():.1f}",
        f"- correlation (Pearson) of right with the own discriminator's score: {np.corrcoef(rows[:, 1], rows[:, 2])[0, 1]:+.2f},"
        f" with the other's: {np.corrcoef(rows[:, 1], rows[:, 3])[0, 1]:+.2f}",
        f"- score of the own discriminator, percentiles 5 / 50 / 95: {percentiles}",
        "",
        "| score of the own discriminator at least | regions selected, % | right among them | right among the rest |",
        "|---|---|---|---|",
    ]
    for threshold in sorted({0.1, 0.2, 0.3, 0.4, 0.5, config.eps, 0.8}):
        chosen = rows[:, 2] >= threshold
        inside, outside = (f"{100 * rows[mask, 1].mean():.1f}" if mask.any() else "-" for mask in (chosen, ~chosen))
        lines.append(f"| {threshold:g} | {100 * chosen.mean():.1f} | {inside} | {outside} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
