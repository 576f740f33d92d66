"""An object as a file, of which only what is wanted is read."""

import io
import os
from contextlib import closing
from typing import Any, BinaryIO

from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

from tasks.artifacts.connection import Store, explained, parse_uri, status_of
from tasks.artifacts.fetching import STREAM_ATTEMPTS
from tasks.settings import ServiceError

READ_BYTES = 8 << 20  # at once: some milliseconds of a connection beside those that an answer takes


def open_object(store: Store, uri: str, etag: str | None = None, size: int | None = None) -> BinaryIO:
    """The object at `uri`, of this ETag or as it is now; a ServiceError once it is found to have been replaced.

    Of which both ETag and size are known, nothing is asked but what is read.
    """
    return io.BufferedReader(_Object(store, uri, etag, size), READ_BYTES)


class _Object(io.RawIOBase):
    def __init__(self, store: Store, uri: str, etag: str | None, size: int | None) -> None:
        self._client, self._uri, self._position = store.client, uri, 0
        bucket, key = parse_uri(uri)
        if etag is None or size is None:
            with explained(uri):
                found = store.client.head_object(Bucket=bucket, Key=key)
            if etag is not None and found["ETag"] != etag:
                raise self._replaced()
            etag, size = found["ETag"], found["ContentLength"]
        self._size: int = size
        self._asked = {"Bucket": bucket, "Key": key, "IfMatch": etag}

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
        read = self._read(min(self._position + len(buffer), self._size))
        buffer[: len(read)] = read
        return len(read)

    def readall(self) -> bytes:
        return self._read(self._size)

    def _read(self, end: int) -> bytes:
        if end <= self._position:
            return b""
        with explained(self._uri):
            for left in reversed(range(STREAM_ATTEMPTS)):
                try:
                    read = self._body(end)
                    break
                except (HTTPClientError, IncompleteReadError):
                    if not left:
                        raise
        if len(read) != end - self._position:
            raise ServiceError(f"{self._uri}: the answer has other bytes than were asked for", transient=True)
        self._position = end
        return read

    def _body(self, end: int) -> bytes:
        try:
            answer = self._client.get_object(**self._asked, Range=f"bytes={self._position}-{end - 1}")
        except ClientError as error:
            if status_of(error) != 412:
                raise
            raise self._replaced() from error
        with closing(answer["Body"]) as body:
            return bytes(body.read())

    def _replaced(self) -> ServiceError:
        return ServiceError(f"{self._uri} was replaced while it was read; run again")
