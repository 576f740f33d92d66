"""An object as a file, of which only what is wanted is read."""

import io
import os
from contextlib import closing
from typing import Any, BinaryIO

from tasks.artifacts.connection import Store, explained, parse_uri
from tasks.settings import ServiceError

READ_BYTES = 8 << 20  # at once: some milliseconds of a connection beside those that an answer takes


def open_object(store: Store, uri: str) -> BinaryIO:
    """The object at `uri`, as it is now: a ServiceError from whatever reads on after it was replaced."""
    return io.BufferedReader(_Object(store, uri), READ_BYTES)


class _Object(io.RawIOBase):
    def __init__(self, store: Store, uri: str) -> None:
        self._client, self._uri, self._position = store.client, uri, 0
        bucket, key = parse_uri(uri)
        with explained(uri):
            found = store.client.head_object(Bucket=bucket, Key=key)
        self._size: int = found["ContentLength"]
        self._asked = {"Bucket": bucket, "Key": key, "IfMatch": found["ETag"]}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        wanted = {**self._asked, "Range": f"bytes={self._position}-{end - 1}"}
        with explained(self._uri), closing(self._client.get_object(**wanted)["Body"]) as body:
            read = bytes(body.read())
        if len(read) != end - self._position:
            raise ServiceError(f"{self._uri}: the answer broke off; try again", transient=True)
        buffer[: len(read)] = read
        self._position = end
        return len(read)
