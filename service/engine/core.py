"""The engine's step: schedule, launch, collect, commit. Called by the engine process and by `generate`."""

import logging
from collections.abc import Callable

from service.engine.request import Delta
from service.engine.scheduler import Scheduler
from service.model.batch import Batch, DeviceLost, OutOfMemory, Runner

log = logging.getLogger(__name__)


class Core:
    """A scheduler and its runner. Whatever a step raises but DeviceLost, its sequences get their last Delta."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self._scheduler = scheduler
        self._runner = runner

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is in flight: a step would do nothing."""
        return not self._scheduler.num_open and not self._scheduler.num_launched

    def step(self, on_start: Callable[[tuple[int, ...]], None] = lambda _: None) -> list[Delta]:
        """Launch the next batch, if there is one, and collect the oldest, if it is due. Raises DeviceLost.

        What cannot wait is returned; the scheduler's `take_held` has the other tokens.

        `on_start` hears which requests leave the queue, before the launch, which the process might not survive.
        """
        batch = self._scheduler.schedule()
        started = self._scheduler.take_started()
        if started:
            on_start(started)
        deltas: list[Delta] = []
        launched = batch is not None and self._launch(batch, deltas)
        # With nothing launched now, what is in flight is collected whatever the runner's depth.
        if self._scheduler.num_launched > (self._runner.depth if launched else 0):
            self._collect(deltas)
        return deltas

    def _launch(self, batch: Batch, deltas: list[Delta]) -> bool:
        try:
            self._runner.launch(batch)
        except DeviceLost:
            raise
        except OutOfMemory as error:
            log.warning("a step of %d tokens did not fit in memory: %s", len(batch.token_ids), error)
            if not self._scheduler.retreat():
                deltas += self._scheduler.fail("out of memory", launched=False)
            return False
        except Exception as error:
            log.exception("a step failed")
            deltas += self._scheduler.fail(f"a step failed: {error}", launched=False)
            return False
        return True

    def _collect(self, deltas: list[Delta]) -> None:
        try:
            output = self._runner.collect()
        except DeviceLost:
            raise
        except Exception as error:
            log.exception("a step failed")
            deltas += self._scheduler.fail(f"a step failed: {error}", launched=True)
        else:
            deltas += self._scheduler.commit(output)
