"""Commands about one set of weights: import it, evaluate it, predict with it."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.errors import NotFound, SweepError, user_errors
from orchestration.formatting import table
from orchestration.observe.status import HEADS
from orchestration.store.base import is_key
from orchestration.store.open import open_store
from rrn_core.config import Runtime
from rrn_core.data.lists import first_few
from rrn_core.errors import DataError

if TYPE_CHECKING:  # torch and the images of a data set load slowly, and `plan` needs neither
    import torch

    from rrn_core.data.dataset import Images, Pixels
    from rrn_core.weights import Model

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
Palette = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation for both branches and the ensemble."""

    protocol: dict[str, Any]
    """What was evaluated, and with which settings."""
    miou: dict[str, float | None]
    """mIoU in 0..1 by head; None without a labelled pixel. `reported` is that of the head that the setting `ensemble` selects."""
    iou: dict[str, dict[str, float | None]]
    """IoU in 0..1 by head, then by class; None if a class neither occurs nor is predicted."""

    def record(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {**self.protocol, "miou": self.miou, "iou": self.iou}

    def __str__(self) -> str:
        """A table in percent, and the protocol."""
        rows = [[name, *(_percent(self.iou[head][name]) for head in HEADS)] for name in self.iou["ensemble"]]
        means = ["mIoU", *(_percent(self.miou[head]) for head in HEADS)]
        return f"{table([['class', *HEADS], *rows, means])}\n\n{', '.join(f'{key} {value}' for key, value in self.protocol.items())}"


def import_weights(source: Path, out: Path) -> str:
    """Convert a checkpoint of RRN or CPS, or an ImageNet backbone, to a safetensors file. Returns a text: what was found, SHA-256 of `out`.

    Raises:
        SweepError: a source that is not one of these, or a name that does not end in .safetensors.
    """
    from rrn_core.foreign_weights import read_released

    if out.suffix != ".safetensors":
        raise SweepError(f"{out}: expected a name that ends in .safetensors")
    with user_errors():
        imported = read_released(source)
        body = imported.to_bytes()
        write(out, body)
    return f"{imported}\nwritten   {out}, {len(body) / 2**20:.1f} MiB, SHA-256 {hashlib.sha256(body).hexdigest()}"


def evaluate_checkpoint(
    checkpoint: str, runtime: Runtime, *, changes: Mapping[str, Any] | None = None, stride: int | None = None
) -> Evaluation:
    """Evaluate a checkpoint on validation images as the paper does: sliding windows, one confusion matrix over all images.

    Args:
        checkpoint: a file, a folder or a URI, as for `read_weights`.
        changes: settings that replace those of the checkpoint, such as dataset, crop, ensemble, ensemble_weight, precision, eval_batch.
        stride: distance of the windows in pixels. Unset: two thirds of the crop.

    Raises:
        SweepError: weights, data or settings that cannot be used, or weights and data with different classes.
    """
    from rrn_core.data.dataset import open_validation
    from rrn_core.evaluate import evaluate
    from rrn_core.weights import load_model

    with user_errors():
        model = load_model(read_weights(checkpoint), name=checkpoint, changes=changes)
        data = open_validation(model.config, runtime)
        model = _ordered(model, data.classes, checkpoint)
        device = _set_up(runtime)
        with _with_progress(data.val) as images:
            metrics = evaluate(model.quartet.to(device), images, data.classes, model.config, device, stride=stride)
    return _evaluation(metrics, data.classes, _protocol(checkpoint, model, len(data.val), stride))


def predict_images(
    checkpoint: str,
    files: Sequence[Path],
    out: Path,
    runtime: Runtime,
    *,
    changes: Mapping[str, Any] | None = None,
    stride: int | None = None,
) -> list[Path]:
    """For each image NAME.*, given itself or by its folder, write NAME.png, a palette image of the predicted classes, and
    NAME_overlay.png, half colours and half image.

    The numbers and colours of the classes are those of the data set if they are known, by its name or from dataset.yaml in
    `runtime.data_root`; else the numbers of the checkpoint and the colours of PASCAL VOC. Files of the same names in `out` are replaced,
    but never the images themselves.

    Returns:
        The written files, two for each image.

    Raises:
        SweepError: as `evaluate_checkpoint`; an image that cannot be read; two images whose results would have the same name.
    """
    from rrn_core.data.images import read_image
    from rrn_core.evaluate import predict
    from rrn_core.weights import load_model

    files = list(_images(files))
    _refuse_clashes(files, out)
    if missing := [file for file in files if not file.is_file()]:
        raise SweepError(f"{missing[0]}: no such image{f', and {len(missing) - 1} more' if missing[1:] else ''}")
    with user_errors():
        model = load_model(read_weights(checkpoint), name=checkpoint, changes=changes)
        classes, palette = _known_classes(model, runtime, changes or {})
        model = _ordered(model, classes, checkpoint) if classes else model
        device = _set_up(runtime)
        quartet = model.quartet.to(device)
        out.mkdir(parents=True, exist_ok=True)
        written: list[Path] = []
        for file in _tracked(files, "predict"):
            image = read_image(file)
            written += _write_pictures(image, predict(quartet, image, model.config, device, stride=stride), palette, out / file.stem)
    return written


def read_weights(checkpoint: str) -> bytes:
    """The bytes of a weights file: of a file, or of the model.safetensors in a folder or under a URI such as
    `s3://bucket/prefix/SWEEP/TRIAL/checkpoints/STEP-ATTEMPT`.

    Raises:
        SweepError: there is no such file.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", checkpoint):
        parent, _, name = checkpoint.rstrip("/").rpartition("/")
        key = name if name.endswith(".safetensors") else f"{name}/{WEIGHTS}"
        if not is_key(key):
            raise SweepError(f"{checkpoint}: not the URI of weights; expected URI/NAME.safetensors, or the URI of a folder with {WEIGHTS}")
        try:
            return open_store(parent, deadline_s=30).read(key)[0]
        except NotFound:
            raise SweepError(
                f"{checkpoint}: {key} is not in the store; expected the URI of weights, or of a folder with {WEIGHTS}"
            ) from None
    path = Path(checkpoint).expanduser()
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise SweepError(f"{file}: no such file; expected weights, a folder with {WEIGHTS}, or the URI of such a folder")
    return file.read_bytes()


def _ordered(model: Model, classes: Sequence[str], checkpoint: str) -> Model:
    """The model with its scores in the order of the data's `classes`. Logs one warning if only numbers can be compared."""
    trained, dataset = (model.metadata.config or {}).get("dataset"), model.config.dataset
    try:
        ordered = model.ordered_as(classes, remedy=f"name the data set of the weights (--data, --data-root), not {dataset}")
    except DataError as error:
        raise SweepError(f"{checkpoint}: {error}") from None
    if model.metadata.classes is None and (dataset == "folder" or trained != dataset):
        log.warning("%s: the weights do not name their classes, so they are matched with those of %s by number", checkpoint, dataset)
    return ordered


def _images(places: Iterable[Path]) -> Iterator[Path]:
    """The files, and the images in the folders in the order of their names. Logs one line for other files of a folder.

    Raises:
        SweepError: a folder without an image.
    """
    from rrn_core.data.images import IMAGE_SUFFIXES

    for place in places:
        if not place.is_dir():
            yield place
            continue
        with user_errors():
            inside = sorted(file for file in place.iterdir() if not file.name.startswith("."))
        images = [file for file in inside if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise SweepError(f"{place}: holds no image; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        if others := [file.name for file in inside if file not in images]:
            log.warning("%s: %d of %d entries are not images and left out: %s", place, len(others), len(inside), first_few(others))
        yield from images


def _set_up(runtime: Runtime) -> torch.device:
    import torch

    from rrn_core.training import device_of

    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    return device_of(runtime)


class _CountedImages:
    """Images that call `advance` at each access."""

    def __init__(self, images: Images, advance: Any) -> None:
        self.names = images.names
        self._images, self._advance = images, advance

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int, /) -> tuple[Pixels, Pixels]:
        self._advance()
        return self._images[index]


@contextmanager
def _with_progress(images: Images) -> Iterator[Images]:
    """The images, with a progress bar that advances when one is read."""
    with progress_bar() as bar:
        task = bar.add_task("evaluate", total=len(images))
        yield _CountedImages(images, lambda: bar.advance(task))


def _tracked(files: Sequence[Path], description: str) -> Iterator[Path]:
    """The files, with a progress bar."""
    with progress_bar() as bar:
        yield from bar.track(files, description=description)


def progress_bar() -> Any:
    """A progress bar of rich on stderr, shown only on a terminal, so that redirected output has none."""
    from rich.progress import MofNCompleteColumn, Progress

    from orchestration.observe.terminal import Terminal

    console = Terminal(stderr=True)
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console, transient=True, disable=not console.is_terminal)


def _protocol(checkpoint: str, model: Model, images: int, stride: int | None) -> dict[str, Any]:
    from rrn_core.evaluate import default_stride

    config = model.config
    return {
        "checkpoint": checkpoint,
        "dataset": config.dataset,
        "images": images,
        "backbone": config.backbone,
        "crop": config.crop,
        "stride": stride or default_stride(config.crop),
        "ensemble": config.ensemble,
        "ensemble_weight": config.ensemble_weight,
        "precision": config.precision,
    }


def _evaluation(metrics: Mapping[str, float], classes: Sequence[str], protocol: dict[str, Any]) -> Evaluation:
    miou = {head: metrics.get(f"val/miou_{head}") for head in HEADS} | {"reported": metrics.get("val/miou")}
    iou = {head: {name: metrics.get(f"val/iou_{head}/{name}") for name in classes} for head in HEADS}
    return Evaluation(protocol, miou, iou)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _refuse_clashes(files: Sequence[Path], out: Path) -> None:
    taken: dict[Path, Path] = {file.resolve(): file for file in files}
    for file in files:
        for result in _results(out.resolve() / file.stem):
            if other := taken.get(result):
                raise SweepError(f"{file}: its result {result.name} would replace {other} or its result; use another folder or name")
        taken |= dict.fromkeys(_results(out.resolve() / file.stem), file)


def _results(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}_overlay.png")


def _known_classes(model: Model, runtime: Runtime, changes: Mapping[str, Any]) -> tuple[Sequence[str], Palette]:
    """Classes and colours of the data set. If no data set is named, or its folder is not given: no classes, and VOC's colours."""
    from rrn_core.data.dataset import known_classes
    from rrn_core.data.labels import voc_palette

    named = bool(model.metadata.config or "dataset" in changes)
    if not named or (model.config.dataset == "folder" and runtime.data_root is None):
        return (), voc_palette(model.num_classes)
    return known_classes(model.config, runtime)


def _write_pictures(image: Pixels, labels: Pixels, palette: Palette, stem: Path) -> tuple[Path, Path]:
    import numpy as np
    from PIL import Image

    colours = np.array(palette, np.uint8)
    flat, overlay = _results(stem)
    picture = Image.fromarray(labels)
    picture.putpalette(colours.tobytes())
    picture.save(flat)
    Image.fromarray(((image.astype(np.uint16) + colours[labels] + 1) // 2).astype(np.uint8)).save(overlay)
    return flat, overlay


def write(file: Path, body: bytes) -> None:
    """Write the file under a temporary name and rename it, so that it is never incomplete. Creates its folder. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}.tmp")
    staged.write_bytes(body)
    staged.replace(file)
