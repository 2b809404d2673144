"""Export a checkpoint as a self-contained folder: weights, sweep file, model card, and an ONNX file checked against torch."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.errors import Corrupt, NotFound, SweepError, user_errors
from orchestration.export.best_checkpoint import BestCheckpoint
from orchestration.export.model_card import CONFIG, FILES, ONNX, README, WEIGHTS, ModelCardFacts, class_names, model_card, sweep_file
from orchestration.formatting import bytes_shown
from orchestration.inference import progress_bar
from orchestration.record.manifest import read_checkpoint, sha256_of
from orchestration.store.base import Store
from rrn_core.config import Runtime
from rrn_core.errors import ConfigError, DataError

if TYPE_CHECKING:  # torch loads slowly
    from orchestration.export.onnx_model import Agreement
    from rrn_core.data.dataset import DataSet, Pixels
    from rrn_core.weights import Model

IMAGES = 4
"""Images on which the ONNX file is compared with torch."""
LONGEST_SLUG = 80


@dataclass(frozen=True)
class Exported:
    """A folder that was written."""

    folder: Path
    choice: BestCheckpoint
    """With a note for every better checkpoint that is damaged."""
    sizes: Mapping[str, int]
    agreement: Agreement | None
    """None if no ONNX file was requested."""

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {bytes_shown(size)}" for name, size in self.sizes.items())
        lines = [f"{self.folder}: {self.choice.best.where}; {sizes}", *self.choice.notes]
        return "\n".join([*lines, *([f"{ONNX}: {self.agreement}"] if self.agreement else [])])


def export(
    choices: Sequence[BestCheckpoint],
    store: Store,
    out: Path,
    *,
    runtime: Runtime | None = None,
    onnx: bool = True,
    commands: Mapping[str, str] | None = None,
    commit: str | None = None,
) -> Iterator[Exported]:
    """Write one folder per choice: model.safetensors (the stored bytes), config.yaml, model.onnx and README.md (the model card).

    A single choice is written to `out`, several to folders below it that are named after their trials. A folder appears only when it
    is complete; a folder with the same model is updated. If a checkpoint is damaged, the next best one is exported and a note says
    so. A choice that fails does not stop the others.

    Args:
        runtime: locates the data set whose validation images check the ONNX file; without the data, digit scenes are used.
        commands: command lines that train the trials, by trial_id.
        commit: commit of the running code.

    Raises:
        SweepError: after all choices, one line for each that failed: no readable checkpoint, a folder with other content, a missing
            package, or an ONNX file that differs from torch.
    """
    faults: list[str] = []
    names = folder_names(choices)
    for choice in choices:
        try:
            loaded = _load(choice, store)
            folder = out / names[loaded.choice.best.plan.trial_id] if len(choices) > 1 else out
            yield _export(loaded, folder, runtime or Runtime(), onnx, commands or {}, commit)
        except SweepError as error:
            faults.append(str(error))
    if faults:
        raise SweepError(*faults)


def folder_names(choices: Iterable[BestCheckpoint]) -> dict[str, str]:
    """A folder name for every trial that may be exported, by trial_id. Equal names get the ID appended."""
    labels = {candidate.plan.trial_id: candidate.plan.label for choice in choices for candidate in choice.ranking}
    slugs = {trial_id: slug(label) for trial_id, label in labels.items()}
    counts = Counter(name.casefold() for name in slugs.values())
    return {trial_id: f"{name}-{trial_id}" if counts[name.casefold()] > 1 else name for trial_id, name in slugs.items()}


def slug(label: str) -> str:
    """A folder name that is valid on any system: `1/8 eps=0.6 seed 1` becomes `1-8-eps-0.6-seed-1`."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", label)[:LONGEST_SLUG].strip("-.") or "model"


@dataclass(frozen=True)
class _Loaded:
    """A choice whose best checkpoint was read and loaded."""

    choice: BestCheckpoint
    body: bytes
    """The weights file."""
    model: Model


def _load(choice: BestCheckpoint, store: Store) -> _Loaded:
    """Load the best readable checkpoint of the choice. Raises SweepError if there is none."""
    from rrn_core.weights import load_model

    with _progress(choice) as show:
        show("read")
        while True:
            checkpoint = choice.best.checkpoint
            weights = {name: ref for name, ref in checkpoint.objects.items() if name == WEIGHTS}
            try:
                body = read_checkpoint(store, checkpoint.model_copy(update={"objects": weights})).get(WEIGHTS, b"")
                return _Loaded(choice, body, load_model(body, name=WEIGHTS))
            except (Corrupt, NotFound, DataError) as error:
                following = choice.next(str(error))
                if following is None:
                    raise SweepError(f"{choice.best.where} is unusable ({error}), and no other checkpoint is left to export") from error
                choice = following


def _export(loaded: _Loaded, out: Path, runtime: Runtime, onnx: bool, commands: Mapping[str, str], commit: str | None) -> Exported:
    from orchestration.export.onnx_model import OnnxError

    choice, out = loaded.choice, out.expanduser().resolve()
    agreement, fault = None, None
    with _progress(choice) as show, user_errors():
        _refuse_another(out, sha256_of(loaded.body))
        known = _Known(loaded.model, runtime)
        with _published(out) as staged:
            (staged / WEIGHTS).write_bytes(loaded.body)
            (staged / CONFIG).write_text(sweep_file(choice), encoding="utf-8")
            try:
                agreement = _checked_onnx(staged / ONNX, choice, known, show) if onnx else None
            except OnnxError as error:
                fault = error
            result = f"not written, because {fault}" if fault else str(agreement) if agreement else "not requested"
            facts = known.facts(choice, staged, onnx=result, command=commands.get(choice.best.plan.trial_id), commit=commit)
            (staged / README).write_text(model_card(choice, facts), encoding="utf-8")
            sizes = {file.name: file.stat().st_size for file in _files(staged)}
    if fault:
        raise OnnxError(f"{out}: {ONNX} was not written, the other files were: {fault}") from fault
    return Exported(out, choice, sizes, agreement)


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in FILES if (folder / name).exists()]


class _Known:
    """The loaded checkpoint and its data set, if available."""

    def __init__(self, model: Model, runtime: Runtime) -> None:
        from rrn_core.data.dataset import open_validation

        self.model, self.runtime = model, runtime
        self.data: DataSet | None = None
        try:
            self.data = open_validation(model.config, runtime)
        except (DataError, ConfigError):
            return
        # raises DataError for other classes; the stored weights keep their order, which the card and the ONNX file name
        model.order(self.data.classes, remedy="give the data of this sweep as --data-root, or leave it out")

    def images(self) -> tuple[list[Pixels], str]:
        """Validation images, or digit scenes without the data, cropped to 1 x 1.5 windows; and a description of them."""
        from rrn_core.data.digits import Digits

        name, crop = self.model.config.dataset, self.model.config.crop
        if self.data:
            try:
                images = [self.data.val[index][0] for index in _spread(len(self.data.val), IMAGES)]
                return [image[:crop, : 3 * crop // 2] for image in images], f"{len(images)} validation images of {name}"
            except DataError:  # an image is unreadable: use scenes
                pass
        scenes = Digits("val", IMAGES, crop)
        return [scenes[index][0] for index in range(IMAGES)], f"{IMAGES} scenes of digits, because the images of {name} were not available"

    def classes(self, choice: BestCheckpoint) -> tuple[str, ...]:
        """In the order of the scores: as the weights name them, else those of the data set, else those in the metrics (maybe not all)."""
        if self.model.metadata.classes is not None:
            return self.model.metadata.classes
        return self.data.classes if self.data else class_names(choice.best.entry.metrics)

    def facts(self, choice: BestCheckpoint, staged: Path, *, onnx: str, command: str | None, commit: str | None) -> ModelCardFacts:
        from orchestration.export.onnx_model import head_of
        from rrn_core.data.batch import IMAGENET_MEAN, IMAGENET_STD

        bodies = {file.name: file.read_bytes() for file in _files(staged)}
        return ModelCardFacts(
            classes=self.classes(choice),
            num_classes=self.model.num_classes,
            normalisation=(IMAGENET_MEAN, IMAGENET_STD),
            head=head_of(self.model.config),
            discriminators=self.model.metadata.discriminator is not None,
            files={name: (len(body), sha256_of(body)) for name, body in bodies.items()},
            onnx=onnx,
            command=command,
            commit=commit,
        )


def _checked_onnx(file: Path, choice: BestCheckpoint, known: _Known, show: Callable[[str], None]) -> Agreement:
    """Write the ONNX file, and delete it if it cannot be used or differs from torch. Raises OnnxError."""
    from orchestration.export.onnx_model import OnnxError, compare, head_of, write_onnx

    chosen, config, classes = choice.best, known.model.config, known.classes(choice)
    facts = {
        "sweep": chosen.plan.sweep,
        "trial": chosen.plan.trial_id,
        "label": chosen.plan.label,
        "epoch": str(chosen.entry.epoch),
        "scores": head_of(config),
        **({"classes": json.dumps(classes)} if len(classes) == known.model.num_classes else {}),
        "num_classes": str(known.model.num_classes),
        "crop": str(config.crop),
        "weights_sha256": chosen.checkpoint.objects[WEIGHTS].sha256,
    }
    show("export ONNX")
    write_onnx(known.model, file, facts)
    images, description = known.images()
    try:
        agreement = compare(
            file,
            known.model,
            images,
            description,
            threads=known.runtime.threads,
            progress=lambda windows: show(f"ONNX and torch compared on {windows} windows"),
        )
        if not agreement.holds:
            raise OnnxError(f"its scores differ from torch: {agreement}")
    except OnnxError:
        file.unlink()
        raise
    return agreement


def _refuse_another(out: Path, sha256: str) -> None:
    """Raises SweepError unless `out` is absent, empty, or holds the weights with this hash."""
    if out.exists() and not out.is_dir():
        raise SweepError(f"{out}: is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    weights = out / WEIGHTS
    if not weights.is_file():
        raise SweepError(f"{out}: is not empty; give a new or an empty folder")
    if sha256_of(weights.read_bytes()) != sha256:
        raise SweepError(f"{out}: holds another model; give another folder, or delete it first")


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A hidden folder that is renamed to `out` at the end. If `out` exists, the files are moved into it, the card last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.parent / f".{out.name}-{uuid.uuid4().hex[:8]}.tmp"
    staged.mkdir()
    try:
        yield staged
        if not out.exists():
            staged.replace(out)
            return
        for name in FILES:
            if (staged / name).exists():
                (staged / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _progress(choice: BestCheckpoint) -> Iterator[Callable[[str], None]]:
    """A function that shows the current step on a terminal."""
    from rich.markup import escape

    with progress_bar() as bar:
        task = bar.add_task(escape(choice.label), total=None)
        yield lambda step: bar.update(task, description=escape(f"{choice.label}: {step}"))


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices below `count`, evenly spaced."""
    wanted = min(count, wanted)
    return [index * (count - 1) // max(1, wanted - 1) for index in range(wanted)]
