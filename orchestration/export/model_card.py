"""Write the model card of an exported checkpoint: training, selection, measurements, use and limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from orchestration.export.best_checkpoint import BestCheckpoint, rules, spread
from orchestration.formatting import bytes_shown, clock
from orchestration.observe.status import HEADS
from orchestration.record.manifest import CONTENTS, SCORE
from rrn_core.config import TrainConfig, labeled_count
from rrn_core.methods import method_of

WEIGHTS, CONFIG, ONNX, README = "model.safetensors", "config.yaml", "model.onnx", "README.md"
FILES = (WEIGHTS, CONFIG, ONNX, README)
"""All files that an export may write."""


@dataclass(frozen=True)
class ModelCardFacts:
    """Facts for the card that the choice does not contain."""

    classes: tuple[str, ...]
    """In the order of the label values; incomplete if the data set is not available."""
    num_classes: int
    normalisation: tuple[Sequence[float], Sequence[float]]
    """Mean and standard deviation of red, green and blue, for pixels in 0..1."""
    head: str
    """The scores of `val/miou` and of the ONNX file: `0.5 x logits of branch 1 + 0.5 x logits of branch 2`."""
    discriminators: bool
    """Whether the weights file contains the discriminators."""
    files: Mapping[str, tuple[int, str]]
    """Size in bytes and SHA-256 of every file except the card."""
    onnx: str
    """Result of the comparison of the ONNX file with torch, or why there is no file."""
    command: str | None = None
    """The command line that trains this trial."""
    commit: str | None = None
    """Commit of the code that exported the checkpoint."""


def model_card(choice: BestCheckpoint, facts: ModelCardFacts) -> str:
    """A README.md with front matter for the Hugging Face Hub. It names no licence, because none was chosen."""
    front = yaml.safe_dump(_front_matter(choice, facts), sort_keys=False, allow_unicode=True)
    plan = choice.best.plan
    parts = [
        f"# {plan.sweep}: {choice.label}",
        _what(choice, facts),
        "## Measured",
        _measured(choice, facts),
        "## Data",
        _data(plan.config, facts),
        "## Training",
        _training(choice, facts),
        "## Use",
        _use(plan.config, facts),
        "## Limits",
        _limits(choice),
        "## Files",
        _files(facts),
        "## Settings",
        f"```yaml\n{_yaml(plan.config.model_dump(mode='json'))}```",
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


def sweep_file(choice: BestCheckpoint) -> str:
    """A sweep file of this trial only. It trains the trial again; with the same store, the trial is already finished."""
    plan = choice.best.plan
    settings = plan.config.model_dump(mode="json", exclude=set(CONTENTS), exclude_none=True)
    lines = [
        f"# Trial {plan.trial_id} of {plan.sweep}, {choice.label}: all settings. `rrn-sweep FILE` trains it.",
        *(["# Paths of lists and weights are relative to this file, then to the data root."] if _has_paths(plan.config) else []),
    ]
    return "\n".join(lines) + "\n" + _yaml({"name": plan.sweep, "base": settings})


def class_names(metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Classes with an IoU of any head, in the order of the label values."""
    heads = [f"val/iou_{head}/" for head in HEADS]
    return tuple(dict.fromkeys(name.removeprefix(head) for head in heads for name in metrics if name.startswith(head)))


def _front_matter(choice: BestCheckpoint, facts: ModelCardFacts) -> dict[str, Any]:
    config = choice.best.plan.config
    named = config.dataset != "folder"
    supervision = ["semi-supervised"] if config.unlabeled_streams else []
    formats = ["safetensors", *(["onnx"] if ONNX in facts.files else [])]
    return {
        "library_name": "rrn-sweep",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", *supervision, "deeplabv3plus", config.backbone, config.method, *formats],
        **({"datasets": [config.dataset]} if named else {}),
        "metrics": ["mean_iou"],
        "model-index": [{"name": f"{choice.best.plan.sweep} {choice.label}", "results": [_result(choice)]}],
    }


def _result(choice: BestCheckpoint) -> dict[str, Any]:
    config, metrics = choice.best.plan.config, choice.best.entry.metrics
    names = {SCORE: "mIoU", **{f"{SCORE}_{head}": f"mIoU of {_head_name(head)}" for head in HEADS}}
    return {
        "task": {"type": "image-segmentation", "name": "Semantic segmentation"},
        "dataset": {"type": config.dataset, "name": f"{config.dataset}, validation list", "split": "validation"},
        "metrics": [{"type": "mean_iou", "name": name, "value": round(metrics[key], 6)} for key, name in names.items() if key in metrics],
    }


def _what(choice: BestCheckpoint, facts: ModelCardFacts) -> str:
    config = choice.best.plan.config
    extra = " The weights file also contains the discriminators; inference does not need them." if facts.discriminators else ""
    return (
        f"Two DeepLabv3+ branches on a {config.backbone} backbone for semantic segmentation into {facts.num_classes} classes,"
        f" trained by {method_of(config.method).TITLE}, with partition {config.partition} of the labels of {config.dataset},"
        f" seed {config.seed}."
        f" Its scores are {facts.head}.{extra}"
    )


def _measured(choice: BestCheckpoint, facts: ModelCardFacts) -> str:
    chosen = choice.best
    metrics = chosen.entry.metrics
    rows = [[name, *(_percent(metrics.get(f"val/iou_{head}/{name}")) for head in HEADS)] for name in facts.classes]
    means = ["**mIoU**", *(f"**{_percent(metrics.get(f'{SCORE}_{head}'))}**" for head in HEADS)]
    notes = [
        f"This is the checkpoint of epoch {chosen.entry.epoch} of {chosen.plan.config.epochs} (iteration {chosen.checkpoint.step}).",
        *(f"{_sentence(rule)}" for rule in rules(choice)),
        *(["Several seeds were trained: " + _seed_mean(choice)] if len(chosen.by_seed) > 1 else []),
        *map(_sentence, choice.notes),
        "A class that neither occurs nor is predicted has no IoU (-). Void pixels are not counted.",
    ]
    title = "IoU in percent, sliding windows over whole images, one confusion matrix over all of them:"
    return "\n\n".join([title, _table([["class", *map(_head_name, HEADS)], *rows, means]), _bullets(notes)])


def _seed_mean(choice: BestCheckpoint) -> str:
    by_seed = choice.best.by_seed
    seeds = ", ".join(map(str, sorted(by_seed)))
    return f"the mean of {choice.metric} over seeds {seeds} is {spread(by_seed.values())} %. Report this mean, not the best seed."


def _data(config: TrainConfig, facts: ModelCardFacts) -> str:
    lines = [f"{config.dataset}: {_counts(config)}.", f"Labelled images: {_partition(config)}."]
    if len(facts.classes) == facts.num_classes:
        lines.append(f"Label values: {', '.join(f'{value} {name}' for value, name in enumerate(facts.classes))}; 255 is void.")
    return _bullets(lines)


def _counts(config: TrainConfig) -> str:
    if config.split:
        split = config.split
        return (
            f"{split.labeled} labelled, {split.unlabeled} unlabelled and {split.val} validation images;"
            f" SHA-256 of their names by role, and of the classes: `{split.sha256}`"
        )
    if config.dataset == "digits":
        labeled = labeled_count(config.partition, config.train_images)
        unlabeled = config.train_images - labeled or config.train_images
        made = "generated from scikit-learn's handwritten digits"
        return f"{labeled} labelled, {unlabeled} unlabelled and {config.val_images} validation scenes, {made}"
    return "the counts were not recorded"


def _partition(config: TrainConfig) -> str:
    seed = f", partition_seed {config.partition_seed}" if config.partition_by in ("seeded", "balanced") else ""
    listed = f" ({config.labeled_list})" if config.labeled_list else ""
    return f"partition {config.partition}, partition_by {config.partition_by}{listed}{seed}"


def _training(choice: BestCheckpoint, facts: ModelCardFacts) -> str:
    chosen = choice.best
    machine = chosen.manifest.attempts[-1].machine if chosen.manifest.attempts else {}
    lines = [
        f"Sweep {chosen.plan.sweep}, trial {chosen.plan.trial_id} ({choice.label}), seed {chosen.plan.config.seed};"
        f" {clock(chosen.manifest.seconds)} h of training{_attempts(len(chosen.manifest.attempts))}.",
        *([f"Trained with `{facts.command}`."] if facts.command else []),
        f"`rrn-sweep {CONFIG}` trains this trial again, with the same data.",
        *([f"Machine: {', '.join(f'{name} {value}' for name, value in machine.items())}."] if machine else []),
        *([f"Exported by the code of commit {facts.commit}."] if facts.commit else []),
    ]
    return _bullets(lines)


def _attempts(count: int) -> str:
    return f" in {count} attempts, each resumed from a checkpoint" if count > 1 else ""


def _use(config: TrainConfig, facts: ModelCardFacts) -> str:
    code = _SNIPPET.format(weights=WEIGHTS, last=facts.num_classes - 1)
    parts = [
        f"With rrn-sweep installed; `predict` uses sliding windows of {config.crop} pixels, like the evaluation above:",
        f"```python\n{code}```",
        "Or `rrn-sweep predict . IMAGE --out DIR` and `rrn-sweep evaluate .` in this folder.",
    ]
    if ONNX in facts.files:
        mean, std = facts.normalisation
        parts += [
            f"With onnxruntime alone. Input `images`: float32 (N, 3, H, W), RGB, normalised as below; output `scores`: {facts.head},"
            f" (N, {facts.num_classes}, H, W). Any N, H and W. The numbers above use windows of {config.crop} x {config.crop},"
            " with summed scores where windows overlap:",
            f"```python\n{_ONNX_SNIPPET.format(onnx=ONNX, mean=list(mean), std=list(std))}```",
        ]
    return "\n\n".join([*parts, f"ONNX: {facts.onnx}."])


_SNIPPET = """\
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rrn_core.evaluate import predict
from rrn_core.weights import load_model

model = load_model(Path("{weights}"))
image = np.asarray(Image.open("image.png").convert("RGB"))
labels = predict(model.quartet, image, model.config, torch.device("cpu"))  # (H, W), values 0 to {last}
"""

_ONNX_SNIPPET = """\
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{onnx}")
pixels = np.asarray(Image.open("image.png").convert("RGB")) / 255
normalised = (pixels - {mean}) / {std}
(scores,) = session.run(None, {{"images": normalised.transpose(2, 0, 1)[None].astype(np.float32)}})
labels = scores[0].argmax(axis=0)  # (H, W)
"""


def _limits(choice: BestCheckpoint) -> str:
    config = choice.best.plan.config
    lines = [
        "This is one training with one seed. Another seed gives other weights and another number.",
        *(["The checkpoint was selected on the validation images, so the numbers above are not test results."] if choice.selected else []),
        f"It was trained on {config.dataset}; its accuracy on other images is unknown.",
        *(["CamVid is for research use only."] if config.dataset == "camvid" else []),
        "No licence was chosen for these weights, so none is named here; the terms of the data set apply.",
    ]
    if config.precision == "bfloat16":
        lines.append("Trained and measured with bfloat16 autocast; the ONNX file computes in float32, so the last digits may differ.")
    return _bullets(lines)


def _files(facts: ModelCardFacts) -> str:
    rows = [[f"`{name}`", bytes_shown(size), f"`{sha256}`"] for name, (size, sha256) in facts.files.items()]
    return _table([["file", "size", "SHA-256"], *rows])


def _has_paths(config: TrainConfig) -> bool:
    return any((config.train_list, config.labeled_list, config.unlabeled_list, config.init_weights))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _table(rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: first column left-aligned, other columns right-aligned."""
    head, *body = rows
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _head_name(head: str) -> str:
    return head.replace("branch", "branch ")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
