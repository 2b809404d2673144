"""A chosen checkpoint as a folder that stands alone: weights, settings, a model card, and an ONNX file that was checked against torch."""

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

from orchestration.errors import Corrupt, NotFound, SweepError, mendable
from orchestration.export.best_checkpoint import BestCheckpoint
from orchestration.export.model_card import CONFIG, FILES, ONNX, README, WEIGHTS, ModelCardFacts, class_names, model_card, sweep_file
from orchestration.formatting import bytes_shown
from orchestration.inference import progress_bar
from orchestration.record.manifest import read_checkpoint, sha256_of
from orchestration.store.base import Store
from rrn_core.config import Runtime

if TYPE_CHECKING:  # torch loads slowly
    from orchestration.export.onnx_model import Agreement
    from rrn_core.data.dataset import Pixels
    from rrn_core.weights import Model

IMAGES = 4
"""On so many images the ONNX file is compared with torch."""
LONGEST_SLUG = 80


@dataclass(frozen=True)
class Exported:
    """What was written where."""

    folder: Path
    choice: BestCheckpoint
    """With a note for every better checkpoint that turned out to be damaged."""
    sizes: Mapping[str, int]
    agreement: Agreement | None
    """None where no ONNX file was asked for."""

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
    """Write a folder a choice: model.safetensors as the store holds it, config.yaml, model.onnx, and README.md, the model card.

    A single choice becomes `out` itself, several each a folder in it that is named after its trial. Nothing is seen there before all
    of a folder is written; one that holds the very model is renewed. A damaged checkpoint is passed over for the next best, which is
    then said. A choice that cannot be exported does not keep the others back.

    Args:
        runtime: where the data set lies on whose validation images the ONNX file is checked; where it is not at hand, on digit scenes.
        commands: what trains each trial, by its identity.
        commit: of the code that runs.

    Raises:
        SweepError: at the end, a line for each choice of which no checkpoint can be read, whose folder holds something else, or
            whose ONNX file is missing because a package is or because it does not compute what torch does.
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
        raise SweepError("\n".join(faults))


def folder_names(choices: Iterable[BestCheckpoint]) -> dict[str, str]:
    """A folder's name for every trial that may be exported, by its identity; it ends in the identity where labels would clash."""
    labels = {candidate.plan.trial_id: candidate.plan.label for choice in choices for candidate in choice.ranking}
    slugs = {trial_id: slug(label) for trial_id, label in labels.items()}
    taken = Counter(name.casefold() for name in slugs.values())
    return {trial_id: f"{name}-{trial_id}" if taken[name.casefold()] > 1 else name for trial_id, name in slugs.items()}


def slug(label: str) -> str:
    """A folder's name on any system: `1/8 eps=0.6 seed 1` becomes `1-8-eps-0.6-seed-1`."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", label)[:LONGEST_SLUG].strip("-.") or "model"


@dataclass(frozen=True)
class _Loaded:
    """A choice whose best checkpoint was found whole."""

    choice: BestCheckpoint
    body: bytes
    """Its weights file."""
    model: Model


def _load(choice: BestCheckpoint, store: Store) -> _Loaded:
    """The best of the choice that can be read and loaded. Raises SweepError where none can."""
    from rrn_core.weights import load_model

    with _watched(choice) as say:
        say("read")
        while True:
            checkpoint = choice.best.checkpoint
            weights = {name: ref for name, ref in checkpoint.objects.items() if name == WEIGHTS}
            try:
                body = read_checkpoint(store, checkpoint.model_copy(update={"objects": weights})).get(WEIGHTS, b"")
                return _Loaded(choice, body, load_model(body, name=WEIGHTS))
            except (Corrupt, NotFound, ValueError) as error:
                following = choice.next(str(error))
                if following is None:
                    raise SweepError(f"{choice.best.where} cannot be used ({error}), and no other checkpoint is left to export") from error
                choice = following


def _export(loaded: _Loaded, out: Path, runtime: Runtime, onnx: bool, commands: Mapping[str, str], commit: str | None) -> Exported:
    from orchestration.export.onnx_model import OnnxError

    choice, out = loaded.choice, out.expanduser().resolve()
    agreement, fault = None, None
    with _watched(choice) as say, mendable():
        _refuse_another(out, sha256_of(loaded.body))
        known = _Known(loaded.model, runtime)
        with _published(out) as staged:
            (staged / WEIGHTS).write_bytes(loaded.body)
            (staged / CONFIG).write_text(sweep_file(choice), encoding="utf-8")
            try:
                agreement = _checked_onnx(staged / ONNX, choice, known, say) if onnx else None
            except OnnxError as error:
                fault = error
            told = f"not written, because {fault}" if fault else str(agreement) if agreement else "not asked for"
            facts = known.facts(choice, staged, onnx=told, command=commands.get(choice.best.plan.trial_id), commit=commit)
            (staged / README).write_text(model_card(choice, facts), encoding="utf-8")
            sizes = {file.name: file.stat().st_size for file in _files(staged)}
    if fault:
        raise OnnxError(f"{out}: {ONNX} was not written, all else was: {fault}") from fault
    return Exported(out, choice, sizes, agreement)


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in FILES if (folder / name).exists()]


class _Known:
    """The loaded checkpoint and, where it is at hand, its data set."""

    def __init__(self, model: Model, runtime: Runtime) -> None:
        from rrn_core.data.dataset import open_validation

        self.model, self.runtime = model, runtime
        try:
            data = open_validation(model.config, runtime)
            self.data = data if len(data.classes) == model.num_classes else None
        except ValueError:
            self.data = None

    def images(self) -> tuple[list[Pixels], str]:
        """Some validation images, else scenes, at most one and a half windows wide and one high, and what they are."""
        from rrn_core.data.digits import Digits

        name, crop = self.model.config.dataset, self.model.config.crop
        if self.data:
            try:
                images = [self.data.val[index][0] for index in _spread(len(self.data.val), IMAGES)]
                return [image[:crop, : 3 * crop // 2] for image in images], f"{len(images)} validation images of {name}"
            except ValueError:  # one cannot be read: as if none were there
                pass
        scenes = Digits("val", IMAGES, crop)
        return [scenes[index][0] for index in range(IMAGES)], f"{IMAGES} scenes of digits, as the images of {name} were not at hand"

    def classes(self, choice: BestCheckpoint) -> tuple[str, ...]:
        """All of them where the data set is at hand, else those that the metrics name."""
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
            discriminators=self.model.facts.discriminator is not None,
            files={name: (len(body), sha256_of(body)) for name, body in bodies.items()},
            onnx=onnx,
            command=command,
            commit=commit,
        )


def _checked_onnx(file: Path, choice: BestCheckpoint, known: _Known, say: Callable[[str], None]) -> Agreement:
    """Write the ONNX file; it stays only if it agrees with torch. Raises OnnxError."""
    from orchestration.export.onnx_model import OnnxError, compare, head_of, write_onnx

    taken, config = choice.best, known.model.config
    facts = {
        "sweep": taken.plan.sweep,
        "trial": taken.plan.trial_id,
        "label": taken.plan.label,
        "epoch": str(taken.entry.epoch),
        "scores": head_of(config),
        "classes": json.dumps(known.classes(choice)),
        "num_classes": str(known.model.num_classes),
        "crop": str(config.crop),
        "weights_sha256": taken.checkpoint.objects[WEIGHTS].sha256,
    }
    say("export ONNX")
    write_onnx(known.model, file, facts)
    images, told = known.images()
    agreement = compare(
        file,
        known.model,
        images,
        told,
        threads=known.runtime.threads,
        progress=lambda windows: say(f"ONNX and torch compared on {windows} windows"),
    )
    if not agreement.holds:
        file.unlink()
        raise OnnxError(f"it does not compute what torch does: {agreement}")
    return agreement


def _refuse_another(out: Path, sha256: str) -> None:
    if out.exists() and not out.is_dir():
        raise SweepError(f"{out}: is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    weights = out / WEIGHTS
    if not weights.is_file():
        raise SweepError(f"{out}: is not empty; name a new or an empty folder")
    if sha256_of(weights.read_bytes()) != sha256:
        raise SweepError(f"{out}: holds another model; name another folder, or delete it first")


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place in the end; into one that is there its files are moved, the card last."""
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
def _watched(choice: BestCheckpoint) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says which part is going on."""
    from rich.markup import escape

    with progress_bar() as bar:
        task = bar.add_task(escape(choice.label), total=None)
        yield lambda part: bar.update(task, description=escape(f"{choice.label}: {part}"))


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices below `count`, evenly spread."""
    wanted = min(count, wanted)
    return [index * (count - 1) // max(1, wanted - 1) for index in range(wanted)]
