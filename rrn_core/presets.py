"""Named sets of settings, each plain and complete in what it is about."""

from __future__ import annotations

from typing import Any

_PAPER: dict[str, Any] = {
    "crop": 512,
    "scales": (0.5, 0.75, 1.0, 1.5, 1.75, 2.0),
    "hflip": 0.5,
    "cutmix_boxes": 3,
    "cutmix_area": (0.25, 0.5),
    "backbone": "resnet50",
    "discriminator": "patch",
    "discriminator_width": 64,
    "region_kernel": 10,
    "feature_pool": "auto",
    "eps": 0.6,
    "lambda1": 1.0,
    "lambda2": 1.0,
    "lambda3": 0.1,
    "drlc": True,
    "drlc_weighting": "sum_of_masked_means",
    "region_upsample": "bilinear",
    "gate": "ge",
    "region_label": "own",
    "region_loss_from_epoch": 1,
    "judge_dropout": True,
    "discriminator_scaling": "batch",
    "mask_void": False,
    "feature_matching": "mean",
    "cps_on_labeled": False,
    "supervised_ce": "plain",
    "batch_size": 6,
    "accumulate": 1,
    "epochs": 32,
    "lr": 0.0025,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "poly_power": 0.9,
    "warmup_epochs": 10,
    "discriminator_lr": 1e-4,
    "ensemble": "logits",
    "ensemble_weight": 0.5,
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "released": {**_PAPER, "discriminator": "image", "gate": "gt", "weight_decay": 1e-4},
    "cityscapes": {
        "dataset": "cityscapes",
        "crop": 800,
        "eps": 0.7,
        "lambda1": 5.0,
        "supervised_ce": "ohem",
        "batch_size": 4,
        "accumulate": 2,
        "epochs": 128,
        "lr": 0.02,
        "warmup_epochs": 0,
    },
    "digits": {
        "dataset": "digits",
        "crop": 64,
        "hflip": 0.0,
        "scales": (0.8, 1.0, 1.25),
        "backbone": "tiny",
        "discriminator_width": 8,
        "region_kernel": 1,
        "lambda1": 0.2,
        "lambda2": 0.2,
        "batch_size": 4,
        "epochs": 5,
        "lr": 0.1,
        "warmup_epochs": 1,
        "eval_batch": 32,
    },
}
"""`paper` names every setting of METHOD.md 1.6 and has the epochs of partition 1/16. It equals the defaults, that is METHOD.md's default
column: where it has to choose between the equations and what the authors ran, it takes what they ran, so that `feature_matching` is a mean
and not the L1 norm of (2), and `cps_on_labeled` is off though (5) has it. `released`: what the authors' script does otherwise.
`cityscapes`: the paper's values for it, on top of the defaults; where the paper is silent (OHEM, no warm-up, the epochs of 1/16), those of
CPS on Cityscapes. `digits`: the embedded data on a CPU within a minute. Its networks start from random weights, and with the paper's
lambda1 = lambda2 = 1 they would teach each other that all is background before they have seen a digit; hence the smaller ones.
"""
