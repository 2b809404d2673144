"""Measures whether the discriminators of a trained RRN trial recognise which regions of a pseudo-label are right.

    python benchmarks/region_maps.py STORE SWEEP TRIAL --data-root CAMVID --out benchmarks/results/region_maps

It evaluates the newest checkpoint on mixed training images. As in training, the branches normalise over the batch. Dropout of the
discriminators is off. It writes OUT.md, and OUT.png with five images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from orchestration.plan.sweep_file import build_config
from orchestration.record.manifest import read_manifest
from orchestration.store.open import open_store
from rrn_core import Runtime
from rrn_core.data.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from rrn_core.data.batches import Batches
from rrn_core.data.dataset import DataSet, open_dataset
from rrn_core.data.labels import VOID
from rrn_core.losses import hard_labels, scale_image
from rrn_core.methods import build_networks
from rrn_core.methods.cps import MixedImages, mixed_pass
from rrn_core.methods.rrn import Settings, discriminator_inputs
from rrn_core.networks.quartet import Quartet
from rrn_core.picture_grid import GridRow, coloured, errors, heat, photograph, sheet, swatch

BATCHES = 40
COLUMNS = ("mixed image", "true labels", "branch 1", "where it errs", "score of D1", "score of D2")
FIRST = 10_000_000
"""Index of the first batch; no training of this length has used these batches."""


def main() -> None:
    """Load the trial, measure, write the report."""
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
            measured, picture = judged(quartet, batches[FIRST + i], config, data)
            rows += measured
            pictures += [picture] if i < 5 else []
    text = report(np.array(rows), config, f"{arguments.sweep}, {label}")
    arguments.out.with_suffix(".md").write_text(text)
    names = [(name, swatch(colour)) for name, colour in zip(data.classes, data.palette, strict=True)]
    Image.fromarray(sheet(pictures, COLUMNS, [names])).save(arguments.out.with_suffix(".png"))
    print(text)


def opened(store_uri: str, sweep: str, trial: str, data_root: Path) -> tuple[str, Settings, Quartet, DataSet]:
    """Label, settings, networks and data of the trial, with the weights of its newest checkpoint."""
    store = open_store(store_uri)
    manifest = read_manifest(store, sweep, trial)
    assert manifest is not None, f"{sweep}/{trial}: not in {store_uri}"
    config = build_config(manifest.config)
    assert isinstance(config, Settings), f"{sweep}/{trial}: expected a trial of method rrn, got {config.method}"
    data = open_dataset(config, Runtime(data_root=data_root.resolve()))
    quartet = build_networks(config, len(data.classes))
    quartet.load_state_dict(load(store.read(manifest.checkpoints[-1].objects["model.safetensors"].key)[0]))
    for judge in quartet.discriminators():
        judge.eval()
    return manifest.label, config, quartet, data


def judged(quartet: Quartet, batch: Batch, config: Settings, data: DataSet) -> tuple[list[list[float]], GridRow]:
    """Per region with known labels: branch, share of right pixels, scores of its own and the other discriminator. Also a picture."""
    mixed = mixed_pass(quartet.branch1, quartet.branch2, batch)
    pairs = discriminator_inputs(mixed, batch, config)
    d1, d2 = quartet.discriminators()
    rows: list[list[float]] = []
    scores: list[Tensor] = []
    for branch, (z, pair, own, other) in enumerate(((mixed.z1, pairs.predicted1, d1, d2), (mixed.z2, pairs.predicted2, d2, d1)), start=1):
        mine, cross = own(pair)[0].sigmoid(), other(pair)[0].sigmoid()
        known = (mixed.hidden != VOID).float()
        right = (hard_labels(z) == mixed.hidden).float() * known
        cells = mine.shape[-2:]
        known_share, right_share = (F.adaptive_avg_pool2d(maps.unsqueeze(1), cells) for maps in (known, right))
        usable = known_share > 0.2
        columns = [(right_share / known_share.clamp(min=1e-6))[usable], mine[usable], cross[usable]]
        rows += [[branch, *values] for values in torch.stack(columns, dim=1).tolist()]
        scores += [mine, cross] if branch == 1 else []
    return rows, picture_of(mixed, scores, data)


def picture_of(mixed: MixedImages, scores: list[Tensor], data: DataSet) -> GridRow:
    """The panels of the first image of the batch."""
    pixels = scale_image(mixed.image[:1], scaling="unnormalise", mean=IMAGENET_MEAN, std=IMAGENET_STD)[0].permute(1, 2, 0).numpy()
    maps = [F.interpolate(score[:1], size=pixels.shape[:2], mode="bilinear", align_corners=True)[0, 0].numpy() for score in scores]
    truth, predicted = mixed.hidden[0].numpy(), hard_labels(mixed.z1)[0].numpy()
    image = (255 * pixels.clip(0, 1)).round().astype(np.uint8)
    panels = (photograph(image), coloured(truth, data.palette), coloured(predicted, data.palette), errors(predicted, truth))
    captions = {len(panels) + i: f"{rc.min():.2f} .. {rc.max():.2f}" for i, rc in enumerate(maps)}
    return GridRow("", (*panels, *map(heat, maps)), captions)


def report(rows: NDArray[np.float64], config: Settings, trial: str) -> str:
    """Markdown: correlation of score and truth, and what each threshold selects."""
    percentiles = " / ".join(f"{q:.2f}" for q in np.percentile(rows[:, 2], (5, 50, 95)))
    lines = [
        f"# Region maps of {trial}",
        "",
        f"{len(rows)} regions of {BATCHES} batches of mixed unlabelled training images, both branches; eps of the training {config.eps:g}.",
        "right: share of a region's known pixels that the branch labels correctly, in percent.",
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
