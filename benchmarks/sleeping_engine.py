"""An engine process whose steps sleep: real scheduler, page pool, messages and links, without a model's work.

`SleepingLLM` is an AsyncLLM with such engines. So a fleet of several engines can be measured on a machine that has too
few cores for it. As a program, this file is the engine process: python sleeping_engine.py FD WORK COSTS
"""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from octavo import AsyncLLM
from octavo.backends.base import StepBatch, StepResult
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.loading import assemble
from octavo.engine.work_record import WorkRecord
from octavo.frontend.links.engine_loop import EngineLoop
from octavo.frontend.links.engine_main import Connection, Heartbeat
from octavo.frontend.links.messages import Load, Ready
from octavo.frontend.links.process import EngineProcess, ProcessLink
from octavo.machine import memory_kills
from octavo.simulation import CostModel, Shape, SimulatedBackend, VirtualClock

FIRST_TOKEN, VOCABULARY = 3, 500  # ids of texts: the first ones of the tiny tokenizer are special
HIDDEN = 0.03  # seconds
MOST_IDS = 2**17  # more than any tokenizer here has


class SleepingBackend(SimulatedBackend):
    """A Backend (see backends.base) whose steps sleep for the time that a cost model gives.

    What the engine does in Python since the last step, and waking up late, is part of the next step's time, as where
    it overlaps with the work of a device. So steps in a row take the modeled time, however busy the processor is, as
    long as that is less than HIDDEN per step.
    """

    def __init__(self, costs: CostModel):
        super().__init__(costs, VirtualClock())
        self.spec = replace(self.spec, vocab_size=MOST_IDS)
        self._ended = 0.0  # when the last step should have ended

    def step(self, batch: StepBatch) -> StepResult:
        now, seconds = time.monotonic(), self._costs.seconds(Shape.of(batch))
        until = (self._ended if now - self._ended < HIDDEN else now) + seconds
        ends = batch.tokens[batch.sample_rows].astype(np.int64) + batch.positions[batch.sample_rows]
        tokens = FIRST_TOKEN + (ends * 7919 + 12345) % VOCABULARY
        time.sleep(max(0.0, until - time.monotonic()))
        self._ended = until
        return StepResult(tokens.astype(np.int32))


def sleeping_engine(config: EngineConfig, costs: CostModel, work: WorkRecord | None = None) -> Engine:
    """Return an engine on a SleepingBackend, with the pages that the cost model has."""
    return assemble(
        config,
        SleepingBackend(costs),
        num_pages=costs.num_pages,
        max_model_len=config.max_model_len or costs.max_model_len,
        fingerprint="sleeping",
        work=work,
    )


class SleepingProcess(EngineProcess):
    """A process of this file; see EngineProcess."""

    def __init__(self, costs: Path):
        self.memory_kills = memory_kills()
        work = WorkRecord.share()
        self.work = WorkRecord(work)
        self.socket, theirs = socket.socketpair()
        fds = (theirs.fileno(), work)
        command = [sys.executable, __file__, *map(str, fds), str(costs)]
        self.popen = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        theirs.close()
        os.close(work)


class SleepingLLM(AsyncLLM):
    """An AsyncLLM whose engines sleep. `costs` is the file of their cost model."""

    costs: Path

    @classmethod
    def of(cls, config: EngineConfig, costs: Path) -> "SleepingLLM":
        """Return an AsyncLLM with these settings. The model is needed for its tokenizer only."""
        llm = cls.__new__(cls)
        llm.costs = costs
        llm._set_up(config)
        return llm

    def _connect(self, replica: int, process: EngineProcess | None = None) -> ProcessLink:
        return ProcessLink(self.config, self._path, SleepingProcess(self.costs), replica)


def main(fd: int, work: int, costs: Path) -> None:
    """Serve as engine_main does."""
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    heartbeat = Heartbeat(connection)
    heartbeat.start()
    messages = connection.receive(block=True)
    while not messages:
        messages = connection.receive(block=True)
    load = messages[0]
    assert isinstance(load, Load)
    engine = sleeping_engine(EngineConfig(**load.config), CostModel.load(costs), WorkRecord(work))
    heartbeat.loop = loop = EngineLoop(engine, connection.send, connection.wake)
    connection.send(Ready(engine.info))
    loop.run(connection.receive)
    engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
