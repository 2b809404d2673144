"""Which epochs of a trial are drawn, and the files that come of it."""

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
ABOUT = 5
"""Drawings of a run whose rule does not say how often."""


def drawn(report: Report, config: TrainConfig, runtime: Runtime, rule: PictureRule) -> dict[int, dict[str, bytes]]:
    """Files by epoch: those of the epoch that `report` completes, where the rule wants it drawn.

    `predictions.png`: `panels` of validation images, the same ones for all trials of a list. `confusion.json`: `classes`; `head`, whose
    predictions were counted; `counts`, a row for each true class. Whatever goes wrong is told in the log and costs the picture only.
    """
    if report.confusion is None or not is_due(report.epoch, config.epochs, rule):
        return {}
    try:
        return {report.epoch: {PREDICTIONS: _predictions(report, config, runtime, rule.images), CONFUSION: _confusion(report, config)}}
    except Exception as error:  # a training of hours must not end for a picture
        log.warning("epoch %d could not be drawn: %s: %s", report.epoch, type(error).__name__, error)
        return {}


def is_due(epoch: int, epochs: int, rule: PictureRule) -> bool:
    """Whether the rule wants `epoch`, counted from 1, of `epochs` drawn."""
    every = rule.every or -(-epochs // ABOUT)
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
    shown = {"classes": report.data.classes, "head": reported_head(config), "counts": report.confusion.tolist()}
    return json.dumps(shown).encode()
