"""Prefect's server with three repairs, all where Prefect lets one choose; uvicorn and Prefect's settings name this.

Transactions on SQLite: one that reads first and then writes fails at once where another wrote between, with "database
is locked", and a state or an event is lost. Begun as a writing one, it waits for its turn.

Connections to SQLite: a failed statement, such as the second writing of an event, is freed at some time or other in the
thread of the event loop. Where its connection waits for its turn just then, in a thread of its own, this blocks the
loop, and with it whoever has the turn, until the waiting one gives up, after a minute. A connection on which a
statement failed is not used again.

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
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, AsyncSessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

_STARTED_MS = time.time_ns() // 1_000_000


def create_app() -> FastAPI:
    """Prefect's application; another database than SQLite is left as it is."""
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if url.startswith("sqlite"):
        MODELS_DEPENDENCIES["database_config"] = SqliteConfiguration(connection_url=url)
    return server.create_app()


class SqliteConfiguration(AioSqliteConfiguration):
    """Prefect's own, with every transaction begun as a writing one, and no connection used after a failure."""

    async def engine(self) -> AsyncEngine:
        engine = await super().engine()
        if not event.contains(engine.sync_engine, "handle_error", _mark_as_failed):
            event.listen(engine.sync_engine, "handle_error", _mark_as_failed)
            event.listen(engine.sync_engine, "checkout", _refuse_failed)
        return engine

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def _mark_as_failed(context: ExceptionContext) -> None:
    if context.connection is not None:
        context.connection.info["failed"] = True


def _refuse_failed(connection: DBAPIConnection, record: ConnectionPoolEntry, checkout: PoolProxiedConnection) -> None:
    if "failed" in record.info:
        raise DisconnectionError("a statement failed on it")  # so the pool closes it and makes another


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, except that nothing waits for an event from before this process."""

    async def wait_for_leader(self, event: ReceivedEvent) -> None:
        if event.follows is None or not _is_earlier(event.follows):
            await super().wait_for_leader(event)


def _is_earlier(identity: UUID) -> bool:
    """By its number, which begins with the milliseconds of its making."""
    return identity.version == 7 and identity.int >> 80 < _STARTED_MS
