"""FileStore under concurrent writes."""

import asyncio
import sys
from pathlib import Path

import pytest

from octavo.server.batch.store import FileStore
from octavo.server.database import Database


@pytest.fixture
def eager_threads():
    """Threads that take turns a thousand times more often than usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 1000)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_concurrent_writers(tmp_path: Path) -> None:
    """The cursor of a write once was deleted in the event loop's thread, during the next write."""

    async def main() -> list[int]:
        database = Database(tmp_path / "octavo.db")
        store = FileStore(tmp_path, database)

        async def write(number: int) -> None:
            for done in range(300):
                await store.put("tenant", {"id": f"batch_{number}", "object": "batch", "done": done})

        await asyncio.gather(*(write(number) for number in range(8)))
        found = [await store.find("batch", "tenant", f"batch_{number}") for number in range(8)]
        database.close()
        return [batch["done"] for batch in found if batch]

    assert asyncio.run(main()) == [299] * 8
