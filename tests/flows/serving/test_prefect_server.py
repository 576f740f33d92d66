"""The repairs of Prefect's server, each against what goes wrong without it."""

import asyncio
import gc
from pathlib import Path

import pytest
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from flows.serving.servers import PrefectServer
from tasks.running.loopback import free_ports


def test_a_failed_statement_that_is_freed_late_stops_nobody(tmp_path: Path) -> None:
    from flows.serving.prefect_server import SqliteConfiguration  # imports Prefect's server

    async def scenario() -> None:
        database = SqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}")
        engine = await database.engine()

        async def write() -> None:
            async with await database.session(engine) as session, database.begin_transaction(session):
                await session.execute(text("INSERT INTO events VALUES (2)"))

        async with engine.connect() as holder:
            await holder.execute(text("CREATE TABLE events (occurred INTEGER NOT NULL)"))
            async with engine.connect() as failing:
                with pytest.raises(IntegrityError) as failure:
                    await failing.execute(text("INSERT INTO events VALUES (NULL)"))
            await holder.execute(text("BEGIN IMMEDIATE"))
            writing = asyncio.create_task(write())
            await asyncio.sleep(0.5)  # it waits for the holder by now, on the connection that was given back
            del failure
            gc.collect()
            await holder.commit()
        await writing  # "database is locked" where it gave up
        await engine.dispose()

    asyncio.run(scenario())


@pytest.mark.services
def test_a_server_is_stopped_once_it_has_every_event_of_this_process(tmp_path: Path) -> None:
    server = PrefectServer(tmp_path, tmp_path / "logs", free_ports(1)[0])
    server.start()
    try:
        server.wait()
        with temporary_settings({PREFECT_API_URL: f"{server.url}/api"}):
            for number in range(300):
                emit_event("sent", resource={"prefect.resource.id": f"test.{number}"})
            waiting = EventsWorker.instance()._queue
        assert waiting.unfinished_tasks
    finally:
        end, server.process.stop = server.process.stop, lambda: None
        server.stop()
        unsent = waiting.unfinished_tasks
        end()
    assert not unsent
