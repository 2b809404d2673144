"""The process in which Ray runs: places the trials that the driver gives out, and reports to it.

Ray's own state is in a scratch folder that is never read again: the store knows what the sweep has done.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Stopper, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from orchestration.errors import ClusterError
from orchestration.run.ray_actor import TrialActor, progress_of, refusal_of
from orchestration.run.ray_nodes import asked, connect, slots
from orchestration.run.ray_private import error_line, error_text, first_sentence, living_nodes
from orchestration.run.ray_process import Ended, Setup

LOOK_EVERY_S = 10.0
"""How often it checks that any node is left."""


def main(descriptor: int) -> None:
    """Entry point of the process. `descriptor`: of the connection to the driver, which first sends a `Setup`."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    driver = _Driver(Connection(descriptor))
    setup: Setup = driver.receive()
    logging.getLogger("orchestration").addHandler(_ToDriver(driver))
    sys.argv[:1] = [setup.program]  # Ray adds its folder to the path of the workers
    try:
        with connect(setup.address):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: None)  # the driver decides; Ray's own handlers would end this process
            _run(setup, driver)
            driver.send(Ended())  # before Ray shuts down, which may end this process
    except ClusterError as error:
        driver.send(Ended(str(error), expected=True))
    except BaseException as error:  # whatever comes out of Ray, the driver decides what follows
        traceback.print_exc()  # into the log
        driver.send(Ended(f"Ray failed: {first_sentence(error)}"))


def _end_with_driver() -> None:
    """The driver holds the other end of the standard input and never writes."""
    sys.stdin.buffer.read()
    os._exit(1)


class _ToDriver(logging.Handler):
    """Warnings of this process appear on the driver's terminal."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__(logging.WARNING)
        self._driver = driver

    def emit(self, record: logging.LogRecord) -> None:
        self._driver.call("warned", record.getMessage())


class _Driver:
    """The driver's `Dispatch` (dispatch.py), by remote calls."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def call(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            self._connection.send((method, arguments))
            return self.receive()

    def send(self, ended: Ended) -> None:
        self._connection.send(ended)

    def receive(self) -> Any:
        return self._connection.recv()


def _run(setup: Setup, driver: _Driver) -> None:
    """Run trials until the driver has none left or stops the sweep, and all have ended.

    Raises:
        ClusterError: no node can hold a trial.
        Exception: whatever Ray raises.
    """
    resources = setup.resources
    concurrent = slots(resources)
    with tempfile.TemporaryDirectory(prefix="rrn-sweep-", ignore_cleanup_errors=True) as scratch:
        tuner = Tuner(
            tune.with_resources(TrialActor, asked(resources)),
            tune_config=TuneConfig(
                search_alg=_Searcher(setup, driver),
                num_samples=-1,
                max_concurrent_trials=concurrent,
                # starting a worker costs more than a small trial; a GPU trial gets a new one, so that all GPU memory is free
                reuse_actors=resources.gpu == 0,
                trial_name_creator=_trial_id,
                trial_dirname_creator=lambda trial: str(trial.trial_id),  # Tune's own ID: a trial of ours may start again
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0),  # the driver decides every restart
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # the trial itself writes its checkpoints
                stop=_StopAll(driver),
                callbacks=[_Reports(driver)],
                verbose=0,
            ),
        )
        tuner.fit()


class _NeverRestored:
    """Ray pickles its whole set-up to disk. None of it is read again, so all of it is left out."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_NeverRestored, Searcher):
    """Hands the driver's plans to Ray Tune as they are."""

    def __init__(self, setup: Setup, driver: _Driver) -> None:
        super().__init__()  # with a metric, Tune would demand it in every result
        self._job, self._driver = setup.job, driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        plan, more = self._driver.call("next")
        if plan:
            return {"plan": plan, "job": self._job}
        return None if more else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to do: the driver learns it from `_Reports`."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("Ray's state is never restored")


class _StopAll(_NeverRestored, Stopper):
    """Ray calls it many times a second."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._driver.call("stop_requested"))


class _Reports(_NeverRestored, Callback):
    """Passes Ray Tune's callbacks on to the driver."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self._looked_s = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Fail if no node is left, for which Ray would wait forever."""
        if time.monotonic() - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = time.monotonic()
        if not living_nodes():
            raise RuntimeError("no node of the Ray cluster is alive")

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._driver.call("started", _trial_id(trial))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        if progress := progress_of(result):
            self._driver.call("progressed", _trial_id(trial), progress)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if reason := refusal_of(trial.last_result or {}):
            self._driver.call("refused", _trial_id(trial), reason)
        else:
            self._driver.call("completed", _trial_id(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        text = error_text(trial)
        self._driver.call("died", _trial_id(trial), error_line(text), text)


def _trial_id(trial: Trial) -> str:
    return str(trial.config["plan"].trial_id)
