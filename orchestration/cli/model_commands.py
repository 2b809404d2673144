"""Commands about one set of weights: weights import, evaluate, predict."""

from __future__ import annotations

import argparse
import json

from orchestration import inference
from orchestration.cli.context import changed_settings, own_runtime
from orchestration.cli.exit_codes import OK


def import_weights(arguments: argparse.Namespace) -> int:
    print(inference.import_weights(arguments.source, arguments.out))
    return OK


def evaluate(arguments: argparse.Namespace) -> int:
    runtime, changes = own_runtime(arguments), changed_settings(arguments)
    found = inference.evaluate_checkpoint(arguments.checkpoint, runtime, changes=changes, stride=arguments.stride)
    print(json.dumps(found.record(), indent=2) if arguments.json else found)
    return OK


def predict(arguments: argparse.Namespace) -> int:
    runtime, changes = own_runtime(arguments), changed_settings(arguments)
    written = inference.predict_images(
        arguments.checkpoint, arguments.images, arguments.out, runtime, changes=changes, stride=arguments.stride
    )
    print(f"{len(written)} files in {arguments.out}")
    return OK
