"""Run what a sweep lacks, with a live view and a tracker, and say how it ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.compare.published import published_table
from orchestration.errors import ClusterError, LeaseLost, SweepError
from orchestration.observe import status
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.inputs import STORED
from orchestration.record.lease import Lease
from orchestration.record.manifest import Manifest, read_manifest
from orchestration.record.trial_record import settle
from orchestration.run.git_checkout import git_diff, git_state
from orchestration.run.signals import Sigterm, gently
from orchestration.sweep import Sweep
from rrn_core.config import Runtime

if TYPE_CHECKING:
    from orchestration.observe.events import Event
    from orchestration.tracking.descriptions import SweepFacts

RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard copies of every report
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: the store makes an immediate stop safe
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "30",  # for the last checkpoints of a sweep that is stopped
}
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it edits the environment from a thread
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the tracker has its own back-off
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Runner:
    """One run of a sweep under its lease.

    Args:
        chosen: the trials to train; the others are only shown.
        environment: names the Ray cluster, if any, in RAY_ADDRESS.
        command: what the user gave; makes the whole sweep again.
        sigterm: whether the process was told to end.
    """

    def __init__(
        self,
        sweep: Sweep,
        runtime: Runtime,
        lease: Lease,
        *,
        chosen: Sequence[TrialPlan],
        environment: Mapping[str, str],
        command: str,
        sigterm: Sigterm,
        say: Callable[[str], None],
    ) -> None:
        from orchestration.run.notifications import Notifier
        from orchestration.run.stopping import Stop
        from orchestration.tracking.run_files import stored
        from orchestration.tracking.tracker import Tracker

        self._sweep, self._runtime, self._lease, self._chosen, self._say = sweep, runtime, lease, chosen, say
        self._ray_address = environment.get("RAY_ADDRESS") or None
        finished = len(sweep.plans) - len(sweep.unfinished)
        self._notifier = Notifier(sweep.spec.notify, sweep.name, total=sweep.total, finished=finished, environment=environment)
        self._stop, self._again, self._sigterm = Stop(say), command, sigterm
        self._committed: dict[str, int] = {}
        self._tracker = Tracker(
            sweep.tracking,
            sweep=sweep.name,
            store=sweep.store.uri,
            read=self._manifest,
            fetch=stored(sweep.store),
            driver=lease.token,
            tags={"sweep_file": str(sweep.file), **git_state()},
            code=git_diff(),
            facts=facts(sweep, command),
            overview=overview(sweep, command),
        )

    def run(self) -> Sweep:
        """Train what is chosen and not finished; how it ended, for the exit code.

        Raises:
            SweepError: files that the unfinished trials need are missing, or the store, MLflow or Ray refuse.
            LeaseLost: another driver took the sweep over.
            KeyboardInterrupt: stopped, with the books in order; Terminated where a signal other than Ctrl-C did it.
        """
        with self._noticed():
            return self._run()

    @contextmanager
    def _noticed(self) -> Iterator[None]:
        """Whoever wants to know is told how the sweep ended; of one that another driver has, that driver tells."""
        try:
            yield
        except ClusterError as error:
            with suppress(SweepError):
                self._notifier.ended(self._sweep.reread(), stopped=str(error))
            raise
        finally:
            with _spinner("telling whom `notify:` names"):
                self._notifier.close(timeout_s=30)

    def _run(self) -> Sweep:
        sweep = self._sweep
        _require_files(sweep, self._runtime, remote=self._ray_address is not None)
        self._say(f"sweep {sweep.name}: {sweep.count}")
        for line in _skipped(sweep):
            self._say(line)
        # an unwritable store is told here, before anything is started
        sweep.write_tracked(sweep.tracked())
        sweep.inputs.upload()
        self._tracker.start([plan.trial_id for plan in sweep.plans])
        interrupted: KeyboardInterrupt | None = None
        try:
            if self._chosen or len(sweep.plans) < sweep.total:
                self._train()
        except KeyboardInterrupt as stop:
            interrupted = stop
            self._say("\ninterrupted: finishing the books; the same command goes on from the last checkpoints")
        except LeaseLost:
            self._tracker.abandon()  # MLflow has another writer now
            raise
        finally:
            behind, cut_short = self._close()
        ended = sweep.reread()
        ended.write_tracked({plan.trial_id for plan in ended.plans} - {plan.trial_id for plan in ended.unfinished} - set(behind))
        self._conclude(ended)
        if self._stop.reason and self._stop.tripped:
            self._notifier.breaker(self._stop.reason)
        self._notifier.ended(ended, stopped=self._stop.reason)
        if stopped := interrupted or cut_short:
            raise stopped
        return ended

    def _close(self) -> tuple[list[str], KeyboardInterrupt | None]:
        """Tell MLflow how it ended, whatever ended it: the trials of which it lacks something, and the signal that cut this short."""
        try:
            with _spinner("MLflow is told how it ended"):
                return self._tracker.close(timeout_s=60), None
        except KeyboardInterrupt as stop:
            self._say("MLflow lacks something, as it was not told all; the same command adds it")
            return [plan.trial_id for plan in self._sweep.plans], stop

    def _train(self) -> None:
        from rich.console import Console

        from orchestration.observe.live import LiveView
        from orchestration.run import ray_nodes, ray_tune
        from orchestration.run.trial import Job

        sweep = self._sweep
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        spec = sweep.spec
        job = Job(sweep.store.uri, self._runtime, spec.retention, spec.retries, self._lease.token, pictures=spec.pictures)
        try:
            with ray_nodes.connect(self._ray_address):
                self._sigterm.listen()
                self._sigterm.check()
                view = LiveView(console, total=sweep.total, finished=len(sweep.plans) - len(sweep.unfinished))
                with gently(self._stop), view:
                    ray_tune.run(
                        self._source(),
                        job,
                        resources=spec.resources,
                        listeners=[view, self._track, self._notifier],
                        stop=self._stop,
                        lease=self._lease,
                    )
        finally:
            self._sigterm.listen()

    def _manifest(self, trial_id: str) -> Manifest | None:
        return read_manifest(self._sweep.store, self._sweep.name, trial_id)

    def _track(self, event: Event) -> None:
        """Tell the tracker of what was committed, not of mere progress."""
        trial_id, committed = event.plan.trial_id, event.update.committed if event.update else -1
        if self._committed.get(trial_id) != committed:
            self._committed[trial_id] = committed
            self._tracker.notify(trial_id)

    def _source(self) -> Any:
        if self._sweep.spec.search:
            from orchestration.run.search import AdaptiveSource

            skip = {plan.trial_id for plan in self._sweep.unfinished} - {plan.trial_id for plan in self._chosen}
            return AdaptiveSource(self._sweep.spec, self._sweep.manifests, self._sweep.inputs.resolve, skip=skip)
        from orchestration.run.trial_source import FixedSource

        return FixedSource(self._chosen)

    def _conclude(self, sweep: Sweep) -> None:
        self._say(f"\n{status.summary(sweep.plans, sweep.manifests)}\n\n{sweep.count}")
        self._say(
            "mIoU in percent on the validation list; b1, b2, ens: branch 1, branch 2, their ensemble; best: epoch with the best val/miou"
        )
        if sweep.spec.published:
            self._say(f"\n{published_table(sweep.spec.published, sweep.plans, sweep.manifests)}\n")
        self._say(f"checkpoints: {sweep.store.uri}/{sweep.name}")
        self._say(f"MLflow UI:   {self._tracker.comparison_url or self._command('ui')}")
        self._say(f"one page:    {self._command('compare')} --out status.html")

    def _command(self, name: str) -> str:
        """Another command about this very sweep."""
        return self._again.replace("rrn-sweep ", f"rrn-sweep {name} ", 1)


def _spinner(words: str) -> AbstractContextManager[object]:
    """On a terminal, while something may take seconds."""
    from rich.console import Console

    return Console(stderr=True).status(words)


def settle_dead(sweep: Sweep, lease: Lease) -> Sweep:
    """Close the attempts that a dead driver left open, with what it had last seen of them; from here on none of its trials can commit."""
    for trial_id in sorted({*sweep.manifests, *lease.previous}):
        manifest, seen = sweep.manifests.get(trial_id), lease.previous.get(trial_id)
        worked_s = seen.worked_s if seen and (manifest is None or seen.attempt == manifest.attempt) else 0.0
        lease.forget(trial_id)
        if manifest is None or (manifest.attempts and manifest.attempts[-1].ended_ms is None):
            reason = "its driver ended without a word"
            settle(sweep.store, sweep.name, trial_id, driver=lease.token, failure="lost", reason=reason, worked_s=worked_s)
    return sweep.reread()


def facts(sweep: Sweep, command: str) -> SweepFacts:
    """What the description of the sweep says besides what its trials tell."""
    from orchestration.tracking.descriptions import SweepFacts

    return SweepFacts(sweep.spec.description, command, sweep.total)


def overview(sweep: Sweep, command: str) -> Callable[[], Mapping[str, bytes]]:
    """Makes the files of the sweep's own run, from what the store knows at that moment."""
    from orchestration.compare import formats

    formats.load()  # here and not in the tracker's thread: where two threads import at once, Python may find a deadlock
    source = formats.source([sweep.file], command=command, code=git_state())
    return lambda: formats.overview(sweep.reread(), source=source)


def _require_files(sweep: Sweep, runtime: Runtime, *, remote: bool) -> None:
    """Refuse a sweep without its data or weights before anything is started; a folder that only the cluster has cannot be looked at."""
    for plan in sweep.to_run:
        if plan.config.dataset != "digits":
            _require_data(plan, runtime.data_root, remote=remote)
        if plan.config.init_weights and not plan.config.init_sha256:
            raise SweepError(_absent(plan.config.init_weights, sweep.file.resolve().parent))


def _absent(written: str, folder: Path) -> str:
    if written.startswith(STORED):
        return f"init_weights: {written}: the store has no such key"
    made = f"make it from a released file with: rrn-sweep weights import FILE --out {folder / written}"
    return f"init_weights: {written} is neither beside the sweep file nor under the data root; {made}"


def _require_data(plan: TrialPlan, root: Path | None, *, remote: bool) -> None:
    if root is None:
        raise SweepError(f"--data-root: trial {plan.label} needs the folder of {plan.config.dataset}; give it, or set RRN_DATA_ROOT")
    if not root.is_dir() and not (remote and plan.iterations):
        raise SweepError(f"--data-root: {root} is not a folder")


def _skipped(sweep: Sweep) -> list[str]:
    lines = []
    for plan in sweep.plans:
        state = status.state(sweep.manifests.get(plan.trial_id))
        if state != "new":
            lines.append(f"{plan.trial_id} {plan.label}: {'skipped, ' if state == 'finished' else ''}{state}")
    return lines
