"""Warm actors on a Ray cluster: one that is there, by its address, or one on this machine.

Actors end with the driver. The machines share the folder of the sweep, and find himoe and the text at the same places.
"""

import os
import signal
from typing import Any

from himoe.errors import ConfigError, HimoeError, MissingExtraError
from himoe.sweep.engines import EngineOptions
from himoe.sweep.execution import TRAIN, Outcome, Task, describe, execute, load_runner
from himoe.sweep.pool import FRUITLESS_STARTS
from himoe.sweep.status import FAILED, RUNNING


class _Actor:
    """A process that does one run after the other."""

    def __init__(self, runner: str) -> None:
        load_runner(runner)

    def execute(self, task: dict[str, Any]) -> dict[str, Any]:
        return execute(Task(**task)).as_dict()

    def place(self) -> tuple[str, int]:
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()


class RayActors:
    """A pool of actors; where the cluster is too small for all, some wait.

    Args:
        number: of actors.
        threads: cores of each.
        options: address, and GPUs of each.
        runner: what the tasks will run, loaded once.
    """

    def __init__(self, number: int, threads: int, options: EngineOptions, runner: str = TRAIN) -> None:
        self._ray, self._runner, self._fruitless = import_ray(), runner, 0
        self._ours = not self._ray.is_initialized()
        if self._ours:
            own = {} if options.address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            try:
                self._ray.init(address=options.address, log_to_driver=False, logging_level="error", **own)
            except (ConnectionError, ValueError, RuntimeError) as error:
                where = f"--address {options.address}" if options.address else "--engine ray"
                raise ConfigError(
                    f"{where}: no Ray cluster answers, or it asks for a token (RAY_AUTH_MODE=token): {describe(error)}"
                ) from None
        self._refuse_what_never_fits(threads, options)
        self._remote = self._ray.remote(num_cpus=threads, num_gpus=options.gpus_per_run)(_Actor)
        self._idle = [self._actor() for _ in range(number)]
        self._busy: dict[Any, tuple[Any, Task, Any]] = {}

    def _actor(self) -> Any:
        return self._remote.remote(self._runner)

    def _refuse_what_never_fits(self, threads: int, options: EngineOptions) -> None:
        wanted = {"CPU": float(threads), "GPU": options.gpus_per_run}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0.0) >= number for name, number in wanted.items()) for node in nodes):
            most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted}
            if self._ours:
                self._ray.shutdown()
            raise ConfigError(
                f"no machine of the Ray cluster has {threads} CPUs and {options.gpus_per_run:g} GPUs for a run; the "
                f"most on one are {most['CPU']:g} and {most['GPU']:g}: lower --cpus-per-run or --gpus-per-run"
            )

    def room(self) -> int:
        """Return how many actors have no task."""
        return len(self._idle)

    def submit(self, task: Task) -> None:
        """Give a task to an actor that has none."""
        actor = self._idle.pop()
        place = actor.place.remote()  # answered before the run begins
        self._busy[actor.execute.remote(task.as_dict())] = (actor, task, place)

    def next(self, timeout: float) -> Outcome | None:
        """Return the next outcome, None when there was none; see `Pool`."""
        if not self._busy:
            return None
        ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=timeout)
        if not ready:
            return None
        actor, task, _ = self._busy.pop(ready[0])
        try:
            outcome = Outcome(**self._ray.get(ready[0]))
        except self._ray.exceptions.RayActorError as error:
            return self._replace(task, error)
        self._fruitless = 0
        self._idle.append(actor)
        return outcome

    def _replace(self, task: Task, error: Any) -> Outcome:
        """Start a new actor in the place of one that has died, and return the outcome of its task."""
        self._idle.append(self._actor())
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        if not error.actor_init_failed:
            return Outcome(task.id, FAILED, f"its Ray actor died: {lines[0]}")
        self._fruitless += 1
        if self._fruitless >= FRUITLESS_STARTS:
            raise HimoeError(f"Ray actors end before they are ready: {lines[-1]}")
        return Outcome(task.id, RUNNING)

    def end(self) -> None:
        """Send what runs the signal to save and stop, wait for it, and let all actors go."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        terminate = self._ray.remote(num_cpus=0)(_terminate)
        for _, _, place in self._busy.values():
            if self._ray.wait([place], timeout=0)[0]:  # else it has not begun
                node, pid = self._ray.get(place)
                near = NodeAffinitySchedulingStrategy(node, soft=False)
                self._ray.get(terminate.options(scheduling_strategy=near).remote(pid))
        if self._busy:
            self._ray.wait(list(self._busy), num_returns=len(self._busy), timeout=60)
        self.kill()

    def kill(self) -> None:
        """Let all actors go at once."""
        for actor in [*self._idle, *(actor for actor, *_ in self._busy.values())]:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()


def _terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def import_ray() -> Any:
    """Return the package; raises MissingExtraError where it is not installed."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    return ray
