"""Named sets of settings to start from."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"discriminator": "image", "gate": "gt", "weight_decay": 1e-4},
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
"""Presets by name. Settings that a method does not have are left out for that method.

`paper`: the defaults, with the epochs of partition 1/16. Where the equations and the released code differ, the defaults follow the code:
`feature_matching` is a mean, not the L1 norm of (2), and `cps_on_labeled` is off although (5) has it.

`released`: the settings in which the authors' training script differs from the paper.

`cityscapes`: the paper's values. Where the paper gives none (OHEM, no warm-up, the epochs of 1/16), those of CPS on Cityscapes.

`digits`: trains on the embedded data on a CPU within a minute. The networks start from random weights. With the paper's
lambda1 = lambda2 = 1 each branch would learn from the other to predict background only, before either has learnt a digit. The smaller
weights prevent that.
"""
