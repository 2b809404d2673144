"""Write the scores that `val/miou` measures as an ONNX file, and check that onnxruntime computes the same as torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestration.errors import SweepError
from rrn_core.config import TrainConfig
from rrn_core.data.augment import normalise
from rrn_core.data.dataset import Pixels
from rrn_core.evaluate import slide_all
from rrn_core.untrusted_text import first_sentence
from rrn_core.weights import Model

INPUT, OUTPUT = "images", "scores"
AXES = {0: "batch", 2: "height", 3: "width"}
"""Names of the dynamic axes."""
OPSET = 20

TOLERANCE = 1e-4
"""Largest allowed difference of two scores, relative to the largest score or to 1, whichever is larger."""
WINDOWS = 3
"""Windows per forward pass of the comparison: few, so that several batch sizes occur."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Progress = Callable[[int], None]


class OnnxError(SweepError):
    """model.onnx is missing or wrong; the other files of the export are not affected."""


class Scores(nn.Module):
    """Normalised images (N, 3, H, W) to the scores (N, K, H, W) whose argmax is what `val/miou` measures, in float32."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.branch1 = model.quartet.branch1
        self.branch2 = None if model.config.ensemble == "none" else model.quartet.branch2
        self.probabilities, self.weight = model.config.ensemble == "prob", model.config.ensemble_weight
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.branch1(images)
        if self.branch2 is None:
            return logits
        parts = [logits, self.branch2(images)]
        if self.probabilities:
            parts = [part.softmax(dim=1) for part in parts]
        ensemble: Tensor = self.weight * parts[0] + (1 - self.weight) * parts[1]
        return ensemble


@dataclass(frozen=True)
class Agreement:
    """Difference between onnxruntime and torch on the CPU."""

    images: str
    """Images of the comparison: `4 validation images of digits`."""
    windows: int
    shapes: tuple[tuple[int, int], ...]
    """Height and width of the inputs."""
    largest: float
    """Largest absolute score."""
    difference: float
    """Largest absolute difference of two scores; NaN if a score is NaN."""
    equal: float
    """Share of pixels with the same class in both."""

    @property
    def tolerance(self) -> float:
        return TOLERANCE * max(1.0, self.largest)

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        sizes = ", ".join(f"{height} x {width}" for height, width in self.shapes)
        return (
            f"largest difference of two scores {self.difference:.2g} (allowed {self.tolerance:.2g}, largest score {self.largest:.3g}),"
            f" same class in {100 * self.equal:.4f} % of the pixels; {self.windows} windows of {sizes} from {self.images}"
        )


def require_onnx() -> None:
    """Raises OnnxError with the install command if a package is missing."""
    if absent := [name for name in _PACKAGES if find_spec(name) is None]:
        raise OnnxError(f"{', '.join(absent)} not installed: pip install 'rrn-sweep[export]', or export without ONNX: --no-onnx")


def head_of(config: TrainConfig) -> str:
    """Description of the scores: `0.5 x logits of branch 1 + 0.5 x logits of branch 2`."""
    if config.ensemble == "none":
        return "logits of branch 1"
    what = "logits" if config.ensemble == "logits" else "probabilities"
    return f"{config.ensemble_weight:g} x {what} of branch 1 + {1 - config.ensemble_weight:g} x {what} of branch 2"


def write_onnx(model: Model, file: Path, facts: Mapping[str, str]) -> None:
    """Write `Scores(model)` with dynamic batch, height and width; `facts` become the file's metadata.

    Raises:
        OnnxError: a package is missing, or the export failed.
    """
    require_onnx()
    import onnx

    example = torch.zeros(2, 3, model.config.crop, model.config.crop)
    try:
        with _silenced():
            program = torch.onnx.export(
                Scores(model),
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: dict.fromkeys(AXES, torch.export.Dim.DYNAMIC)},
            )
        assert program is not None
        graph = _cleaned(program.model_proto, facts)
        onnx.checker.check_model(graph)
    except Exception as error:  # the exporter raises many types
        raise OnnxError(f"torch cannot export the networks ({type(error).__name__}: {first_sentence(error)})") from error
    onnx.save(graph, file)


def compare(
    file: Path,
    model: Model,
    images: Sequence[Pixels],
    description: str,
    *,
    threads: int | None = None,
    progress: Progress = lambda windows: None,
) -> Agreement:
    """Run onnxruntime and torch on windows of RGB images (H, W, 3), prepared like the evaluation, and on one narrower window.

    Args:
        description: of the images, for the report.
        threads: threads of onnxruntime; unset, its default.
        progress: called after each pass with the number of windows so far.

    Raises:
        OnnxError: onnxruntime is missing or cannot run the file, or its scores have another shape.
    """
    both = _Both(_session(file, threads), Scores(model), progress)
    with torch.inference_mode():
        crop, classes = model.config.crop, []
        for scores in slide_all(images, both, crop=crop, batch=WINDOWS):
            torch_class, onnx_class = scores.argmax(dim=1)
            classes.append((torch_class == onnx_class).double().mean())
        both(torch.from_numpy(normalise(images[0])[None, :, :crop, : 3 * crop // 4].copy()))
    return Agreement(
        images=description,
        windows=both.windows,
        shapes=tuple(both.shapes),
        largest=torch.stack(both.largest).max().item(),
        difference=torch.stack(both.differences).max().item(),
        equal=torch.stack(classes).mean().item(),
    )


class _Both:
    """Maps windows (N, 3, H, W) to the scores of torch and onnxruntime (N, 2, K, H, W) and records their differences."""

    def __init__(self, session: Any, scores: Scores, progress: Progress) -> None:
        self._session, self._scores, self._progress = session, scores, progress
        self.windows = 0
        self.shapes: dict[tuple[int, int], None] = {}
        self.largest: list[Tensor] = []
        self.differences: list[Tensor] = []

    def __call__(self, windows: Tensor) -> Tensor:
        ours, theirs = self._scores(windows), self._run(windows)
        if ours.shape != theirs.shape:
            raise OnnxError(f"its scores have shape {tuple(theirs.shape)}, expected {tuple(ours.shape)} as in torch")
        self.windows += len(windows)
        self.shapes[windows.shape[2], windows.shape[3]] = None
        self.largest.append(ours.abs().max())
        self.differences.append((ours - theirs).abs().max())
        self._progress(self.windows)
        return torch.stack([ours, theirs], dim=1)

    def _run(self, windows: Tensor) -> Tensor:
        try:
            (scores,) = self._session.run([OUTPUT], {INPUT: windows.numpy()})
        except Exception as error:  # the exceptions of onnxruntime share only the base Exception
            raise OnnxError(f"onnxruntime cannot run it ({first_sentence(error)})") from error
        return torch.from_numpy(np.asarray(scores))


def _session(file: Path, threads: int | None) -> Any:
    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise OnnxError(f"onnxruntime cannot load it ({first_sentence(error)})") from error


def _cleaned(graph: Any, facts: Mapping[str, str]) -> Any:
    """The model without stack traces and paths of this machine, with named dynamic axes and `facts`."""
    import onnx

    body = graph.graph
    for part in (graph, body, *body.node, *body.initializer, *body.input, *body.output):
        part.doc_string = ""
        del part.metadata_props[:]
    del body.value_info[:]  # inferred shapes use the exporter's axis names
    (images,), (scores,) = body.input, body.output
    for place, name in AXES.items():
        for tensor in (images, scores):
            tensor.type.tensor_type.shape.dim[place].dim_param = name
    onnx.helper.set_model_props(graph, dict(facts))
    return graph


@contextmanager
def _silenced() -> Iterator[None]:
    """Mute the exporter: it warns about optional packages and about deprecated functions that it calls itself."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
