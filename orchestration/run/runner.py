"""Run the unfinished trials of a sweep with a live view, MLflow and notifications, then print a summary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.compare.published import published_table
from orchestration.errors import ClusterError, ClusterLost, LeaseLost, StoreError, StoreUnavailable, SweepError
from orchestration.observe import status
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.inputs import STORED
from orchestration.record.lease import Lease
from orchestration.record.manifest import Manifest, read_manifest
from orchestration.record.trial_record import settle
from orchestration.record.trial_state import TrialState
from orchestration.run import ray_process
from orchestration.run.dispatch import Dispatch
from orchestration.run.git_checkout import git_diff, git_state
from orchestration.run.job import Job
from orchestration.run.signals import Termination, graceful_stop
from orchestration.run.stopping import Stop
from orchestration.sweep import Sweep
from rrn_core.config import Runtime

if TYPE_CHECKING:
    from orchestration.observe.events import Event
    from orchestration.tracking.descriptions import SweepFacts

log = logging.getLogger(__name__)

RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard copies of every report
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals.py handles Ctrl-C
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "30",  # time for the last checkpoints after a stop request
}


class Runner:
    """One run of a sweep under its lease.

    Args:
        chosen: the trials to train; the others are only displayed.
        environment: RAY_ADDRESS names a Ray cluster; unset, Ray runs on this machine.
        command: the command line that runs the whole sweep.
        termination: the handler of SIGTERM and SIGHUP that the process installed at its start.
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
        termination: Termination,
        say: Callable[[str], None],
    ) -> None:
        from orchestration.run.notifications import Notifier
        from orchestration.tracking.run_files import stored
        from orchestration.tracking.tracker import Tracker

        self._sweep, self._runtime, self._lease, self._chosen, self._say = sweep, runtime, lease, chosen, say
        self._ray_address = environment.get("RAY_ADDRESS") or None
        finished = len(sweep.finished)
        self._notifier = Notifier(sweep.spec.notify, sweep.name, total=sweep.total, finished=finished, environment=environment)
        self._stop, self._run_command, self._termination = Stop(say), command, termination
        self._committed: dict[str, int] = {}
        self._unwritable: Mapping[str, str] = {}
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
        """Train the chosen trials that are not finished. Returns the sweep as it ended.

        Raises:
            SweepError: files of unfinished trials are missing, or the store, MLflow or Ray failed.
            LeaseLost: another driver took the sweep over.
            ClusterLost: Ray ended and did not come back; MLflow was updated.
            KeyboardInterrupt: stopped by Ctrl-C after MLflow was updated; Terminated if stopped by SIGTERM.
        """
        with self._notifications():
            return self._run()

    @contextmanager
    def _notifications(self) -> Iterator[None]:
        """Send queued notifications at the end. After LeaseLost nothing is added: the other driver reports the end."""
        try:
            yield
        except ClusterLost:
            raise  # its end was reported with the others
        except ClusterError as error:
            with suppress(SweepError):
                self._notifier.ended(self._ended(), stopped=str(error))
            raise
        finally:
            with _spinner("sending notifications"):
                self._notifier.close(timeout_s=30)

    def _run(self) -> Sweep:
        sweep = self._sweep
        _require_files(sweep, self._runtime, remote=self._ray_address is not None)
        self._say(f"sweep {sweep.name}: {sweep.count}")
        for line in _skipped(sweep):
            self._say(line)
        # fails here, before anything starts, if the store is not writable
        sweep.write_tracked(sweep.tracked(), driver=self._lease.token)
        sweep.inputs.upload()
        self._tracker.start([plan.trial_id for plan in sweep.plans])
        interrupted: KeyboardInterrupt | ClusterLost | None = None
        try:
            if self._chosen or len(sweep.plans) < sweep.total:
                self._train()
        except KeyboardInterrupt as stop:
            interrupted = stop
            self._say("\ninterrupted: closing MLflow runs; the same command resumes from the last checkpoints")
        except ClusterLost as lost:
            interrupted = lost
            self._stop.request(str(lost))
        except LeaseLost:
            self._tracker.abandon()  # the other driver writes to MLflow now
            raise
        finally:
            incomplete, cut_short = self._close()
        ended = self._ended()
        ended.write_tracked({plan.trial_id for plan in ended.finished} - set(incomplete), driver=self._lease.token)
        self._conclude(ended)
        if self._stop.reason and self._stop.tripped:
            self._notifier.breaker(self._stop.reason)
        self._notifier.ended(ended, stopped=self._stop.reason)
        if stopped := interrupted or cut_short:
            raise stopped
        return ended

    def _ended(self) -> Sweep:
        """The sweep as it stands once this driver starts no further attempt."""
        found = self._sweep.reread()
        return replace(found, driver=None, unreadable={**found.unreadable, **self._unwritable})

    def _close(self) -> tuple[list[str], KeyboardInterrupt | None]:
        """Update MLflow. Returns the trials that MLflow does not show completely, and the signal that interrupted the update."""
        try:
            with _spinner("updating MLflow"):
                return self._tracker.close(timeout_s=60), None
        except KeyboardInterrupt as stop:
            self._say("MLflow is incomplete: its update was interrupted; the same command completes it")
            return [plan.trial_id for plan in self._sweep.plans], stop

    def _train(self) -> None:
        from orchestration.observe.live import LiveView
        from orchestration.observe.terminal import SharedTerminal

        sweep = self._sweep
        spec = sweep.spec
        job = Job(sweep.store.uri, self._runtime, spec.retention, spec.retries, self._lease.token, pictures=spec.pictures)
        view = LiveView(SharedTerminal(), total=sweep.total, finished=len(sweep.finished))
        dispatch = Dispatch(
            self._source(),
            job,
            listeners=[view, self._track, self._notifier],
            stop=self._stop,
            lease=self._lease,
            ended={trial_id: manifest.attempt for trial_id, manifest in sweep.manifests.items()},
        )
        self._unwritable = dispatch.unwritable
        self._termination.check()
        with graceful_stop(self._stop), view:
            ray_process.train(dispatch, job, address=self._ray_address, resources=spec.resources)

    def _manifest(self, trial_id: str) -> Manifest | None:
        return read_manifest(self._sweep.store, self._sweep.name, trial_id)

    def _track(self, event: Event) -> None:
        """Notify the tracker of a commit; progress between commits is not tracked."""
        trial_id, committed = event.plan.trial_id, event.progress.committed if event.progress else -1
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
        self._say(f"\n{status.summary(sweep.plans, sweep.manifests, sweep.states, unreadable=sweep.unreadable)}\n\n{sweep.count}")
        self._say(
            "mIoU in percent on the validation list; b1, b2, ens: branch 1, branch 2, their ensemble; best: epoch with the best val/miou"
        )
        if sweep.spec.published:
            self._say(f"\n{published_table(sweep.spec.published, sweep.plans, sweep.manifests)}\n")
        self._say(f"checkpoints: {sweep.store.uri}/{sweep.name}")
        self._say(f"MLflow UI:   {self._tracker.comparison_url or self._command('ui')}")
        self._say(f"HTML report: {self._command('compare')} --out report.html")

    def _command(self, name: str) -> str:
        """`rrn-sweep NAME ...` for this sweep."""
        return self._run_command.replace("rrn-sweep ", f"rrn-sweep {name} ", 1)


def _spinner(text: str) -> AbstractContextManager[object]:
    """A spinner on a terminal, for steps that may take seconds."""
    from orchestration.observe.terminal import Terminal

    return Terminal(stderr=True).status(text)


def settle_dead(sweep: Sweep, lease: Lease) -> Sweep:
    """Close the attempts that a dead driver left open, up to the last progress that it recorded. Its trials cannot commit afterwards."""
    finished = {trial_id: manifest for trial_id, manifest in sweep.manifests.items() if manifest.status is TrialState.FINISHED}
    sweep = sweep.reread(known=finished)  # the dead driver may have opened attempts while this one waited for the lease
    for trial_id in sorted({*sweep.manifests, *lease.previous}):
        if trial_id in sweep.unreadable:
            continue
        manifest, seen = sweep.manifests.get(trial_id), lease.previous.get(trial_id)
        worked_s = seen.worked_s if seen and (manifest is None or seen.attempt == manifest.attempt) else 0.0
        if manifest is None or manifest.is_open:
            reason = "driver died without reporting an error"
            try:
                settle(sweep.store, sweep.name, trial_id, driver=lease.token, failure="lost", reason=reason, worked_s=worked_s)
            except StoreUnavailable:
                raise
            except StoreError as error:  # of this trial alone, such as a folder that is not writable: its worker will say so
                log.warning("%s", error)
                continue
        lease.forget(trial_id)
    return sweep.reread()


def facts(sweep: Sweep, command: str) -> SweepFacts:
    """Facts for the MLflow description of the sweep that its trials do not contain."""
    from orchestration.tracking.descriptions import SweepFacts

    return SweepFacts(sweep.spec.description, command, sweep.total)


def overview(sweep: Sweep, command: str) -> Callable[[], Mapping[str, bytes]]:
    """A function that builds the files of the sweep's MLflow run from the current state of the store."""
    from orchestration.compare import formats

    formats.load()  # not in the tracker's thread: concurrent imports in two threads can deadlock
    source = formats.source([sweep.file], command=command, code=git_state())
    return lambda: formats.overview(sweep.reread(), source=source)


def _require_files(sweep: Sweep, runtime: Runtime, *, remote: bool) -> None:
    """Raises SweepError if data or weights of an unfinished trial are missing. `remote`: the data root may exist on the cluster only."""
    for plan in sweep.to_run:
        if plan.config.dataset != "digits":
            _require_data(plan, runtime.data_root, remote=remote)
        if plan.config.init_weights and not plan.config.init_sha256:
            raise SweepError(_missing_weights(plan.config.init_weights, sweep.file.resolve().parent))


def _missing_weights(name: str, folder: Path) -> str:
    if name.startswith(STORED):
        return f"init_weights: {name}: the store has no such key; expected store:KEY of a weights file"
    advice = f"make it from a released file with: rrn-sweep weights import FILE --out {folder / name}"
    return f"init_weights: {name} is neither beside the sweep file nor under the data root; {advice}"


def _require_data(plan: TrialPlan, root: Path | None, *, remote: bool) -> None:
    if root is None:
        raise SweepError(f"--data-root: trial {plan.label} needs the folder of {plan.config.dataset}; give it, or set RRN_DATA_ROOT")
    if not root.is_dir() and not (remote and plan.iterations):
        raise SweepError(f"--data-root: {root} is not a folder; give the folder that holds {plan.config.dataset}")


def _skipped(sweep: Sweep) -> list[str]:
    lines = []
    for plan in sweep.plans:
        state, manifest = sweep.state(plan), sweep.manifests.get(plan.trial_id)
        if manifest:
            lines.append(
                f"{plan.trial_id} {plan.label}: {'skipped, ' if state is TrialState.FINISHED else ''}{status.state_text(state, manifest)}"
            )
    return lines
