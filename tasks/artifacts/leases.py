"""One host at a time does what a lease names: an object that its holder writes again and again, and others watch.

Every change of it is a conditional put, so that of several who want it one gets it. No host's clock is compared with
another's: a lease has expired where one who waits for it has seen it unchanged for LIFE_SECONDS.
"""

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from botocore.exceptions import ClientError

from tasks.artifacts.connection import Store, explained, open_store, parse_uri, status_of
from tasks.settings import ServiceError, Settings

LIFE_SECONDS = 60.0
BEAT_SECONDS = 15.0

_log = logging.getLogger(__name__)


class Lease:
    """The right to do what `key` names. `host` tells this host from others; one of its own is taken over at once.

    So the caller must know that no other process of this host holds it.
    """

    def __init__(self, store: Store, key: str, *, host: str) -> None:
        self._store, self._key = store, key
        self._uri = f"s3://{store.bucket}/{key}"
        self._own = {"host": host, "name": socket.gethostname(), "holder": uuid.uuid4().hex}
        self._etag, self._beats = "", 0
        self._seen, self._since = "", 0.0

    def claim(self) -> str:
        """Take the lease where it is free, this host's, or expired; "" then, and else the name of its holder's host."""
        seen, self._seen = self._seen, ""  # while the store is away, the holder cannot write either
        if self._put(IfNoneMatch="*"):
            return ""
        found = self._look()
        if found is None:
            return "a host that has just ended it"
        body, etag = found
        if etag != seen:
            self._since = time.monotonic()
        self._seen = etag
        if body.get("holder") == self._own["holder"]:  # the answer to our own put was lost
            self._etag = etag
            return ""
        expired = time.monotonic() - self._since >= LIFE_SECONDS
        if (expired or body.get("host") == self._own["host"]) and self._put(IfMatch=etag):
            return ""
        return str(body.get("name", "another host"))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep a lease that was claimed for as long as the block runs, and give it back."""
        stop = threading.Event()
        thread = threading.Thread(target=self._beat_until, args=(stop,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with suppress(ServiceError):  # else it expires
                self._give_back()

    def _beat_until(self, stop: threading.Event) -> None:
        away = False
        while not stop.wait(BEAT_SECONDS):
            try:
                if not self._renew():
                    _log.warning("%s: another host saw no sign of this one, and does the same; both go on", self._uri)
                    return
                away = False
            except ServiceError as error:
                if not away:
                    _log.warning("%s; the lease on it may expire meanwhile", error)
                away = True

    def _renew(self) -> bool:
        """Write the lease again; whether it is still ours."""
        if self._put(IfMatch=self._etag):
            return True
        found = self._look()
        if found is None or found[0].get("holder") != self._own["holder"]:
            return False
        self._etag = found[1]  # the answer to our own put was lost
        return True

    def _put(self, **condition: str) -> bool:
        self._beats += 1  # so that no two writes of it have one ETag
        body = json.dumps({**self._own, "beats": self._beats}).encode()
        with explained(self._uri):
            try:
                answer = self._store.client.put_object(
                    Bucket=self._store.bucket, Key=self._key, Body=body, **condition, **self._store.put_options
                )
            except ClientError as error:
                if status_of(error) not in (404, 409, 412):
                    raise
                if status_of(error) == 404 and "IfNoneMatch" in condition:  # the bucket, not the object
                    raise
                return False
        self._etag = answer["ETag"]
        return True

    def _look(self) -> tuple[dict[str, Any], str] | None:
        with explained(self._uri):
            try:
                answer = self._store.client.get_object(Bucket=self._store.bucket, Key=self._key)
            except self._store.client.exceptions.NoSuchKey:
                return None
            with closing(answer["Body"]) as stream:
                text = stream.read()
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        return body if isinstance(body, dict) else {}, answer["ETag"]

    def _give_back(self) -> None:
        with explained(self._uri):
            try:
                self._store.client.delete_object(Bucket=self._store.bucket, Key=self._key, IfMatch=self._etag)
            except ClientError as error:
                if status_of(error) not in (404, 409, 412):
                    raise


def check_workspace(settings: Settings) -> None:
    """Raise a ServiceError unless the store can hold the workspace of `settings`, and its leases."""
    assert settings.workspace is not None
    bucket, prefix = parse_uri(settings.workspace)
    store = replace(open_store(settings, attempts=2), bucket=bucket)
    where = f"{settings.workspace} at {store.endpoint}"
    probe = {"Bucket": bucket, "Key": f"{prefix}/leases/.probe-{uuid.uuid4().hex}"}
    with closing(store.client) as client, explained(where):
        etag = client.put_object(**probe, Body=b"1", IfNoneMatch="*", **store.put_options)["ETag"]
        client.put_object(**probe, Body=b"2", IfMatch=etag, **store.put_options)
        refused = []
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": etag}):
            try:
                client.put_object(**probe, Body=b"3", **condition, **store.put_options)
            except ClientError as error:
                if status_of(error) != 412:
                    raise
                refused.append(condition)
        client.delete_object(**probe)
    if len(refused) < 2:
        raise ServiceError(
            f"{where}: this server ignores If-None-Match or If-Match, so two hosts would do one step; use another"
        )
