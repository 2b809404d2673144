"""Draw an epoch of a trial: predictions on validation images, and the confusion matrix."""

from __future__ import annotations

import io
import json
import logging

from PIL import Image

from orchestration.plan.spec import PictureRule
from rrn_core.config import Runtime, TrainConfig
from rrn_core.evaluate import reported_head
from rrn_core.pictures import panels, spread
from rrn_core.training import Report, device_of

log = logging.getLogger(__name__)

PREDICTIONS, CONFUSION = "predictions.png", "confusion.json"
DEFAULT_DRAWINGS = 5
"""Approximate number of drawings per run if the rule sets no interval."""


def drawn(report: Report, config: TrainConfig, runtime: Runtime, rule: PictureRule) -> dict[int, dict[str, bytes]]:
    """Draw the epoch that `report` completes. Returns files by epoch; empty if the rule skips this epoch.

    `predictions.png`: `panels` of validation images; trials with the same validation list show the same images.
    `confusion.json`: `classes`; `head`, the predictions that were counted; `counts`, one row per true class.
    Raises nothing: an error is logged and the epoch has no picture.
    """
    if report.confusion is None or not is_due(report.epoch, config.epochs, rule):
        return {}
    try:
        return {report.epoch: {PREDICTIONS: _predictions(report, config, runtime, rule.images), CONFUSION: _confusion(report, config)}}
    except Exception as error:  # a failed picture must not end a training
        log.warning("epoch %d has no picture: %s: %s", report.epoch, type(error).__name__, error)
        return {}


def is_due(epoch: int, epochs: int, rule: PictureRule) -> bool:
    """Whether the rule draws `epoch` (counted from 1) of `epochs`."""
    every = rule.every or -(-epochs // DEFAULT_DRAWINGS)
    return rule.images > 0 and (epoch % every == 0 or epoch == epochs)


def _predictions(report: Report, config: TrainConfig, runtime: Runtime, images: int) -> bytes:
    data, device = report.data, device_of(runtime)
    indices = spread(images, len(data.val))
    picture = panels(report.state.quartet, data.val, data.palette, data.classes, config, device, indices=indices)
    body = io.BytesIO()
    Image.fromarray(picture).save(body, "PNG")
    return body.getvalue()


def _confusion(report: Report, config: TrainConfig) -> bytes:
    assert report.confusion is not None
    record = {"classes": report.data.classes, "head": reported_head(config), "counts": report.confusion.tolist()}
    return json.dumps(record).encode()
