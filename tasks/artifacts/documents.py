"""Small objects that are replaced, listed and removed: what a workspace in the store knows about its files."""

import hashlib
from collections.abc import Iterable, Iterator
from datetime import datetime

from tasks.artifacts.connection import (
    Store,
    abort_upload,
    explained,
    in_base64,
    manifest_bytes,
    objects_below,
    uploads_below,
)
from tasks.settings import ServiceError

MAX_DELETED = 1000  # S3's own limit for one call


def read_document(store: Store, key: str) -> bytes | None:
    """What a small object holds; None where there is none."""
    return manifest_bytes(store, f"s3://{store.bucket}/{key}")


def write_document(store: Store, key: str, body: bytes) -> None:
    """Put a small object, in the place of what was there."""
    with explained(f"s3://{store.bucket}/{key}"):
        store.client.put_object(
            Bucket=store.bucket,
            Key=key,
            Body=body,
            ChecksumSHA256=in_base64(hashlib.sha256(body).digest()),
            **store.put_options,
        )


def documents(store: Store, prefix: str) -> dict[str, tuple[int, datetime]]:
    """The objects whose keys begin with `prefix`, by key: their bytes, and when each was last written."""
    with explained(f"s3://{store.bucket}/{prefix}"):
        return {entry["Key"]: (entry["Size"], entry["LastModified"]) for entry in objects_below(store, prefix)}


def remove_objects(store: Store, keys: Iterable[str]) -> None:
    """Remove objects; those that are not there are as good as removed."""
    every = list(keys)
    for start in range(0, len(every), MAX_DELETED):
        some = [{"Key": key} for key in every[start : start + MAX_DELETED]]
        with explained(f"s3://{store.bucket}/{every[start]}"):
            answer = store.client.delete_objects(Bucket=store.bucket, Delete={"Objects": some, "Quiet": True})
        for refused in answer.get("Errors", ()):
            raise ServiceError(f"s3://{store.bucket}/{refused['Key']}: S3 answers {refused['Code']} to DeleteObjects")


def unfinished(store: Store, prefix: str, before: datetime) -> Iterator[str]:
    """The keys below `prefix` that an upload was begun to before a time, and did not come to its end."""
    with explained(f"s3://{store.bucket}/{prefix}"):
        for upload in uploads_below(store, prefix):
            if upload["Initiated"] < before:
                yield upload["Key"]


def abort_unfinished(store: Store, prefix: str, before: datetime) -> None:
    """Free what uploads have left that were begun before a time."""
    with explained(f"s3://{store.bucket}/{prefix}"):
        for upload in [*uploads_below(store, prefix)]:
            if upload["Initiated"] < before:
                abort_upload(store, upload)
