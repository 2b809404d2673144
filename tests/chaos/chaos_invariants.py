"""Invariants that must hold after any faults; each function returns its violations as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chaos_faults import Bucket
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestration.record.manifest import Attempt, Manifest, sha256_of

SLACK_S = 2.0
EXPECTED = ("finished", "interrupted", "lost", "unavailable")
"""Outcomes of attempts that the injected faults can cause."""

_TIMINGS = ("perf/", "effort/", "system/")


def results(bucket: Bucket, manifests: Sequence[Manifest], undisturbed: Sequence[Manifest]) -> list[str]:
    """Final weights equal those of the undisturbed sweep bit by bit, and metrics point by point."""
    ours, theirs = ({manifest.trial_id: manifest for manifest in found} for found in (manifests, undisturbed))
    if ours.keys() != theirs.keys():
        return [f"trials {sorted(ours)}, expected {sorted(theirs)}"]
    found = []
    for trial_id, manifest in ours.items():
        ref, expected = _weights(manifest), _weights(theirs[trial_id])
        if manifest.status != "finished":
            found.append(f"trial {trial_id} is {manifest.status}: {manifest.reason}")
        if ref is None or ref.sha256 != expected.sha256:
            found.append(f"trial {trial_id} ended with other weights than the undisturbed one")
        elif sha256_of(bucket.read(ref.key)) != ref.sha256:
            found.append(f"trial {trial_id}: {ref.key} is damaged")
        if _history(manifest) != _history(theirs[trial_id]):
            found.append(f"trial {trial_id} has another history than the undisturbed one")
    return found


def accounting(manifests: Iterable[Manifest]) -> list[str]:
    """Seconds and steps of the attempts add up: every step is useful exactly once."""
    found = []
    for manifest in manifests:
        attempts, outcomes = manifest.attempts, [attempt.outcome for attempt in manifest.attempts]
        if [attempt.number for attempt in attempts] != list(range(1, len(attempts) + 1)):
            found.append(f"trial {manifest.trial_id}: attempts are numbered {[attempt.number for attempt in attempts]}")
        if outcomes.count("finished") != 1 or outcomes[-1] != "finished":
            found.append(f"trial {manifest.trial_id}: attempts ended {outcomes}")
        found += [f"trial {manifest.trial_id}: {fault}" for fault in _gaps(manifest)]
        found += [f"trial {manifest.trial_id}, attempt {attempt.number}: {fault}" for attempt in attempts for fault in _unbalanced(attempt)]
    return found


def tracked(client: MlflowClient, sweep: str, undisturbed: str) -> tuple[list[str], int]:
    """MLflow shows every trial once, with the metrics of the store. Returns violations and the number of superseded runs."""
    ours, theirs = _runs(client, sweep), _runs(client, undisturbed)
    kinds = Counter((run.data.tags["rrn.kind"], run.data.tags.get("trial_id", ""), run.info.status) for run in ours)
    superseded = sum(count for (kind, _, _), count in kinds.items() if kind == "superseded")
    expected = Counter((run.data.tags["rrn.kind"], run.data.tags.get("trial_id", ""), "FINISHED") for run in theirs)
    shown = Counter({run: count for run, count in kinds.items() if run[0] != "superseded"})
    found = (
        [f"MLflow: experiment {sweep}: unexpected runs {dict(shown - expected)}, missing runs {dict(expected - shown)}"]
        if shown != expected
        else []
    )
    found += [f"MLflow: run {run.info.run_id} is RUNNING" for run in [*ours, *theirs] if run.info.status == "RUNNING"]
    if (mine := _points(client, ours)) != (reference := _points(client, theirs)):
        more, less = sorted((mine - reference).items())[:3], sorted((reference - mine).items())[:3]
        found.append(
            f"MLflow: experiment {sweep} has {mine.total()} points, expected {reference.total()}: unexpected {more}, missing {less}"
        )
    return found, superseded


def released(bucket: Bucket, sweep: str, output: str) -> list[str]:
    """The lease is released, unless the last driver printed that the store did not answer."""
    free = json.loads(bucket.read(f"{sweep}/lease.json"))["released"] or "not released, the store does not answer" in output
    return [] if free else [f"the lease of {sweep} is not released"]


def litter(bucket: Bucket, sweep: str) -> list[str]:
    """After `rrn-sweep gc` the store holds exactly the objects that manifests name."""
    named = {ref.key for manifest in bucket.manifests(sweep) for ref in manifest.objects}
    keys = bucket.keys(f"{sweep}/")
    ours = {key for key in keys if key.endswith("/manifest.json")} | {f"{sweep}/lease.json", f"{sweep}/tracking.json"}
    found = [f"litter: {key}" for key in keys if key not in named | ours] + [f"missing: {key}" for key in named - set(keys)]
    return found + [f"unfinished upload: {key}" for key in bucket.uploads(f"{sweep}/")]


def leaks(secrets: Mapping[str, bytes], places: Iterable[tuple[str, bytes]]) -> list[str]:
    """No place, given by name and content, contains a secret."""
    return [f"{where} contains the secret {name}" for where, content in places for name, secret in secrets.items() if secret in content]


def _weights(manifest: Manifest) -> Any:
    newest = max(manifest.checkpoints, key=lambda checkpoint: checkpoint.step, default=None)
    return newest and newest.objects["model.safetensors"]


def _history(manifest: Manifest) -> list[tuple[int, int, dict[str, float]]]:
    return [
        (entry.epoch, entry.step, {name: value for name, value in entry.metrics.items() if not name.startswith(_TIMINGS)})
        for entry in manifest.history
    ]


def _gaps(manifest: Manifest) -> list[str]:
    """Steps that no attempt committed, or that two committed without seconds accounted as repeated."""
    found, reached = [], 0
    for attempt in (attempt for attempt in manifest.attempts if attempt.last_step):
        steps = f"attempt {attempt.number} trained steps {attempt.first_step} to {attempt.last_step}, and {reached} were committed before"
        if attempt.first_step > reached or (attempt.first_step < reached) != (attempt.repeated_s > 0):
            found.append(f"{steps}: {attempt.repeated_s:.1f} s repeated")
        reached = max(reached, attempt.last_step)
    return found if reached == manifest.iterations else [*found, f"{reached} of {manifest.iterations} steps are committed"]


def _unbalanced(attempt: Attempt) -> list[str]:
    if attempt.ended_ms is None:
        return ["never closed"]
    lasted_s = (attempt.ended_ms - attempt.started_ms) / 1000
    parts = f"useful {attempt.useful_s:.1f}, repeated {attempt.repeated_s:.1f}, lost {attempt.lost_s:.1f}"
    fault = f"{attempt.outcome} ({attempt.reason}) after {lasted_s:.1f} s, but {parts}"
    if attempt.outcome not in EXPECTED:
        return [f"ended as {attempt.outcome}, expected one of {', '.join(EXPECTED)}: {attempt.reason}"]
    in_order = attempt.outcome in ("finished", "interrupted")
    return [fault] if attempt.seconds > lasted_s + SLACK_S or (in_order and attempt.seconds < lasted_s - SLACK_S) else []


def _runs(client: MlflowClient, sweep: str) -> list[Run]:
    experiment = client.get_experiment_by_name(sweep)
    return list(client.search_runs([experiment.experiment_id], max_results=1000)) if experiment else []


def _points(client: MlflowClient, runs: Iterable[Run]) -> Counter[tuple[str, str, int, float]]:
    """All metric points of the trials except timings; a point that was logged twice counts twice."""
    found: Counter[tuple[str, str, int, float]] = Counter()
    for run in runs:
        if run.data.tags["rrn.kind"] == "trial":
            for name in (name for name in run.data.metrics if not name.startswith(_TIMINGS)):
                points = client.get_metric_history(run.info.run_id, name)
                found.update((run.data.tags["trial_id"], name, point.step, point.value) for point in points)
    return found
