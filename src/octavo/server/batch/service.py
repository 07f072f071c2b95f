"""BatchService: runs the batches of a server beside the requests of its clients, and continues them after a restart."""

import asyncio
import contextlib
import itertools
import logging
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.server.config import ServerConfig
from octavo.server.database import Database
from octavo.server.edge.traffic import Traffic

from .fair_places import FairPlaces
from .lines import LineError, Rows, failed, read_result
from .results import Counts, ResultFile
from .run import BatchRun
from .slots import LowPrioritySlots, TenantSlots
from .store import Content, FileStore

WINDOW_SECONDS = 24 * 3600
SLOTS = 64  # requests of all batches that run at the same time
WINDOW_ROWS = 256
WINDOW_BYTES = 4 * 2**20  # of a batch; see BatchRun
MAX_RUNNING = 8  # batches that run at the same time; others wait
RESERVE = 64  # batches that run besides, of tenants that have no other one running
SAVE_SECONDS = 1.0  # between two updates of a batch's counts
ENDED = ("completed", "failed", "expired", "cancelled")
EXPIRED = LineError("batch_expired", "the batch's 24 hours were over before this request was run")

log = logging.getLogger("octavo.server")


@dataclass
class Running:
    """A batch that has not ended. `work` is the task that answers its rows, while there is one."""

    tenant: str
    batch: Content
    work: "asyncio.Task[None] | None" = None
    task: "asyncio.Task[None] | None" = field(default=None, repr=False)


class BatchService:
    """The batches of a server whose data is in `folder`. Raises ConfigError if the folder cannot be used."""

    def __init__(self, folder: Path, database: Database, config: ServerConfig, traffic: Traffic):
        self.store = FileStore(folder, database)
        self.storing = asyncio.Lock()  # held while a file is stored, so that a tenant's files stay within the limits
        self.running: dict[str, Running] = {}
        self._config = config
        self._slots = LowPrioritySlots(SLOTS, traffic)
        self._places = FairPlaces(MAX_RUNNING, RESERVE)
        self._app: Any = None

    def start(self, app: Any) -> None:
        """Continue the batches that had not ended when the server stopped.

        Args:
            app: the application to whose routes the requests are sent.
        """
        self._app = app
        for tenant, batch in self.store.all_batches():
            if batch["status"] not in ENDED:
                self._begin(Running(tenant, batch))

    async def create(self, tenant: str, source: Content, endpoint: str, metadata: Any) -> Content:
        """Create and begin a batch of the requests in the file `source`."""
        now = int(time.time())
        batch: Content = {
            "id": f"batch_{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": source["id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + WINDOW_SECONDS,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
        }
        os.link(self.store.files / source["id"], self._input(batch))  # the client may delete the file
        await self.store.put(tenant, batch)
        self._begin(Running(tenant, batch))
        return batch

    def unfinished(self, tenant: str) -> int:
        """Return the number of a tenant's batches that have not ended."""
        return sum(running.tenant == tenant for running in self.running.values())

    async def cancel(self, id: str) -> None:
        """Cancel a batch, unless it is already about to end. The results so far are kept."""
        running = self.running.get(id)
        if running is None or running.batch["status"] not in ("validating", "in_progress"):
            return
        await self._set(running, "cancelling")
        if running.work is not None:
            running.work.cancel()

    def _input(self, batch: Content) -> Path:
        return self.store.batches / f"{batch['id']}.input"

    def _results(self, batch: Content) -> Path:
        return self.store.batches / f"{batch['id']}.results"

    def _begin(self, running: Running) -> None:
        id = running.batch["id"]
        self.running[id] = running
        running.task = asyncio.ensure_future(self._run(running))
        running.task.add_done_callback(lambda _: self.running.pop(id, None))

    async def _set(self, running: Running, status: str, *files: Content) -> None:
        running.batch["status"] = status
        running.batch[f"{status}_at"] = int(time.time())
        await self.store.put(running.tenant, running.batch, *files)

    async def _run(self, running: Running) -> None:
        batch = running.batch
        try:
            async with self._places.place(running.tenant):
                await self._advance(running)
        except (OctavoError, OSError) as error:
            log.error("batch %s failed: %s", batch["id"], error)
            batch["errors"] = {"object": "list", "data": [{"code": "batch_failed", "message": str(error)}]}
            await self._set(running, "failed")
        except Exception as error:
            log.error("batch %s failed", batch["id"], exc_info=error)
            data = [{"code": "internal_error", "message": "internal error: the server's log has the details"}]
            batch["errors"] = {"object": "list", "data": data}
            await self._set(running, "failed")

    async def _advance(self, running: Running) -> None:
        """Take a batch from its status to its end."""
        batch, last = running.batch, "completed"
        if batch["status"] == "validating":
            total = await asyncio.to_thread(_count, self._input(batch))
            if not total:
                raise OctavoError("the input file has no requests")
            batch["request_counts"]["total"] = total
            if batch["status"] == "validating":
                await self._set(running, "in_progress")
        if batch["status"] == "in_progress":
            running.work = asyncio.ensure_future(self._answer(running))
            try:
                async with asyncio.timeout(max(batch["expires_at"] - time.time(), 0)):
                    await running.work
            except TimeoutError:
                last = "expired"
                await asyncio.to_thread(self._expire, batch)
            except asyncio.CancelledError:
                if batch["status"] != "cancelling":
                    running.work.cancel()
                    raise
        if batch["status"] == "cancelling":
            last = "cancelled"
        elif batch["status"] == "in_progress":
            await self._set(running, "finalizing")
        files = await asyncio.to_thread(self._split, batch)
        await self._set(running, last, *files)
        self._input(batch).unlink(missing_ok=True)
        self._results(batch).unlink(missing_ok=True)

    async def _answer(self, running: Running) -> None:
        """Answer the rows that have no result yet."""
        batch, saved = running.batch, time.monotonic()
        headers = [(b"x-octavo-tenant", running.tenant.encode("latin-1"))]
        run = BatchRun(self._app, TenantSlots(self._slots, running.tenant), WINDOW_ROWS, headers, WINDOW_BYTES)
        with self._input(batch).open("rb") as file, contextlib.closing(ResultFile(self._results(batch))) as results:
            rows = Rows(file, self._config.max_body_bytes, (batch["endpoint"],))
            await asyncio.to_thread(results.resume, rows)
            async with contextlib.aclosing(run.results(rows)) as groups:
                async for group in groups:
                    results.write(group, sync=False)  # in a thread, cancelling could close the file meanwhile
                    _count_in(batch, results.counts)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        saved = time.monotonic()
                        await self.store.put(running.tenant, batch)
            _count_in(batch, results.counts)
            await asyncio.to_thread(results.sync)

    def _expire(self, batch: Content) -> None:
        """Write an error for each row that has no result."""
        with self._input(batch).open("rb") as file, contextlib.closing(ResultFile(self._results(batch))) as results:
            rows = Rows(file, self._config.max_body_bytes, (batch["endpoint"],))
            results.resume(rows)
            while group := [failed(row, row.error or EXPIRED) for row in itertools.islice(rows, 256)]:
                results.write(group)
            results.sync()
            _count_in(batch, results.counts)

    def _split(self, batch: Content) -> list[Content]:
        """Write the output file and the error file of a batch. Return their objects; a file without lines has none.

        The ids follow from the batch's, so that a repetition after a crash replaces the files.
        """
        made: list[Content] = []
        kinds = [(kind, f"file-{batch['id'].removeprefix('batch_')}-{kind}") for kind in ("output", "error")]
        paths = {kind: self.store.files / id for kind, id in kinds}
        results = self._results(batch)
        results.touch()
        with results.open("rb") as file, paths["output"].open("wb") as output, paths["error"].open("wb") as errors:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn by a crash while the batch was being cancelled
                (errors if read_result(line)[1] else output).write(line)
            for each in (output, errors):
                each.flush()
                os.fsync(each.fileno())
        for kind, id in kinds:
            if size := paths[kind].stat().st_size:
                batch[f"{kind}_file_id"] = id
                made.append(file_object(id, size, f"{batch['id']}_{kind}.jsonl", "batch_output"))
            else:
                paths[kind].unlink()
        return made


def file_object(id: str, size: int, filename: str, purpose: str) -> Content:
    """Return the object that describes a file."""
    return {
        "id": id,
        "object": "file",
        "bytes": size,
        "created_at": int(time.time()),
        "expires_at": None,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
    }


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _count_in(batch: Content, counts: Counts) -> None:
    batch["request_counts"] |= {"completed": counts.completed, "failed": counts.failed}
