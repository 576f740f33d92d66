"""Prefect's server with two repairs, both where Prefect lets one choose; uvicorn and Prefect's settings name this.

Transactions on SQLite: one that reads first and then writes fails at once where another wrote between, with "database
is locked", and a state or an event is lost. Begun as a writing one, it waits for its turn.

Order of events: an event waits for the one that it follows, for a quarter of an hour, and which have come is kept in
memory alone. After a restart the end of a run would wait so long for its beginning, and a crashed run to be run again.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

from fastapi import FastAPI
from prefect.server.api import server
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import MODELS_DEPENDENCIES
from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

_STARTED_MS = time.time_ns() // 1_000_000


def create_app() -> FastAPI:
    """Prefect's application; another database than SQLite is left as it is."""
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if url.startswith("sqlite"):
        MODELS_DEPENDENCIES["database_config"] = SqliteConfiguration(connection_url=url)
    return server.create_app()


class SqliteConfiguration(AioSqliteConfiguration):
    """Prefect's own, with every transaction begun as a writing one."""

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, except that nothing waits for an event from before this process."""

    async def wait_for_leader(self, event: ReceivedEvent) -> None:
        if event.follows is None or not _is_earlier(event.follows):
            await super().wait_for_leader(event)


def _is_earlier(event: UUID) -> bool:
    """By its number, which begins with the milliseconds of its making."""
    return event.version == 7 and event.int >> 80 < _STARTED_MS
