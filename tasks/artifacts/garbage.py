"""What a bucket holds for nothing: versions that their registry no longer points to, and what was interrupted.

A manifest says which registry its version is for. What was published for another one, or does not say, is left alone:
whether something points to it cannot be known here.

A version is removed with a tombstone in its manifest's place. That is where publishing ends, so a run that publishes
the same version at the same time either finds the tombstone and tries again, or was first and is left alone.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from botocore.exceptions import ClientError

from elastic_core.schema import NAME
from tasks.artifacts.connection import (
    FAMILIES,
    PROBE,
    REPORTS,
    Store,
    abort_upload,
    explained,
    manifest_bytes,
    objects_below,
    parse_uri,
    status_of,
    uploads_below,
)
from tasks.artifacts.documents import remove_objects
from tasks.artifacts.manifest import MANIFEST_NAME, REGISTRY, TOMBSTONE, parse_manifest
from tasks.settings import ServiceError

Kind = Literal["version", "begun", "foreign", "upload", "probe"]

_Entry = Mapping[str, Any]  # what S3 lists of an object or an upload
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What is of no use, or seems to be: its objects, bytes and last write.

    A `version` was published for this registry; a `foreign` one was published for another or does not say for which,
    and stays, for the reason in `owner`; a `begun` one has no manifest. An `upload` is what was sent to one key and
    never became an object, a `probe` an object of `check_bucket`.
    """

    kind: Kind
    uri: str
    objects: int
    size: int
    newest: datetime
    owner: str = ""


def find_garbage(store: Store, registry: str, points_to: Collection[str], before: datetime) -> list[Garbage]:
    """What was last written before a time and is of no use to this registry, which points to the URIs `points_to`."""
    with explained(f"s3://{store.bucket}"):
        found = [
            Garbage(
                kind=kind,
                uri=f"s3://{store.bucket}/{key}",
                objects=len(entries),
                size=sum(_size(store, entry) for entry in entries),
                newest=_newest(entries),
            )
            for kind, key, entries in _useless(store, points_to)
            if _newest(entries) < before
        ]
    return [_with_owner(store, one, registry) if one.kind == "begun" else one for one in found]


def _with_owner(store: Store, found: Garbage, registry: str) -> Garbage:
    """A version that nothing points to, with what its manifest says, if it has one."""
    uri = f"{found.uri}{MANIFEST_NAME}"
    body = manifest_bytes(store, uri)
    if body in (None, TOMBSTONE):
        return found
    try:
        mark = parse_manifest(body, uri).metadata.get(REGISTRY)
    except ServiceError:
        return replace(found, kind="foreign", owner="its manifest cannot be read")
    if not isinstance(mark, dict) or "id" not in mark:
        return replace(found, kind="foreign", owner="it does not say for which registry")
    if mark["id"] != registry:
        return replace(found, kind="foreign", owner=f"published for the registry {mark.get('uri', mark['id'])!s:.120}")
    return replace(found, kind="version")


def remove_garbage(store: Store, garbage: Garbage, points_to: Callable[[], Collection[str]], before: datetime) -> bool:
    """Remove what `find_garbage` found, unless it is foreign or has come to life since; whether it was removed."""
    key = parse_uri(garbage.uri)[1]
    if garbage.kind == "foreign":
        return False
    with explained(garbage.uri):
        if garbage.kind in ("version", "begun"):
            return _remove_version(store, key, garbage.kind, points_to, before)
        if garbage.kind == "probe":
            store.client.delete_object(Bucket=store.bucket, Key=key)
        for upload in [*uploads_below(store, key)]:
            if upload["Key"] == key and upload["Initiated"] < before:
                abort_upload(store, upload)
        return True


def _useless(store: Store, points_to: Collection[str]) -> Iterator[tuple[Kind, str, list[_Entry]]]:
    """What may go when it is old enough: its kind, its key or prefix, and what S3 lists of it.

    Of a version, `begun`, nobody has looked yet whether it has a manifest.
    """
    versions: dict[str, list[_Entry]] = defaultdict(list)
    for entry in objects_below(store, FAMILIES):
        if entry["Key"].startswith(PROBE):
            yield "probe", entry["Key"], [entry]
        elif prefix := _version_of(entry["Key"]):
            versions[prefix].append(entry)
    live = {prefix for prefix in versions if _is_pointed_to(store, prefix, points_to)}
    uploads: dict[str, list[_Entry]] = defaultdict(list)
    for upload in (upload for prefix in (FAMILIES, REPORTS) for upload in uploads_below(store, prefix)):
        prefix = _version_of(upload["Key"])
        if prefix in versions and prefix not in live:
            versions[prefix].append(upload)
        else:
            uploads[upload["Key"]].append(upload)
    for key, entries in uploads.items():
        yield "upload", key, entries
    for prefix, entries in versions.items():
        if prefix not in live:
            yield "begun", prefix, [entry for entry in entries if not _is_tombstone(store, entry)]


def _version_of(key: str) -> str | None:
    """The prefix of the version that a key belongs to; None for keys that are not of our making."""
    names = key.removeprefix(FAMILIES).split("/")
    if not key.startswith(FAMILIES) or len(names) < 3 or not all(NAME.fullmatch(name) for name in names[:2]):
        return None
    return f"{FAMILIES}{names[0]}/{names[1]}/"


def _is_pointed_to(store: Store, prefix: str, points_to: Collection[str]) -> bool:
    return any(f"{uri.rstrip('/')}/".startswith(f"s3://{store.bucket}/{prefix}") for uri in points_to)


def _is_tombstone(store: Store, entry: _Entry) -> bool:
    """Whether this is what an interrupted removal left in a manifest's place."""
    return (
        str(entry["Key"]).endswith(f"/{MANIFEST_NAME}")
        and entry.get("Size") == len(TOMBSTONE)
        and manifest_bytes(store, f"s3://{store.bucket}/{entry['Key']}") == TOMBSTONE
    )


def _newest(entries: Collection[_Entry]) -> datetime:
    return max((entry.get("LastModified") or entry["Initiated"] for entry in entries), default=_NEVER)


def _size(store: Store, entry: _Entry) -> int:
    if "UploadId" not in entry:
        return int(entry["Size"])
    pages = store.client.get_paginator("list_parts").paginate(
        Bucket=store.bucket, Key=entry["Key"], UploadId=entry["UploadId"]
    )
    return sum(int(part["Size"]) for page in pages for part in page.get("Parts", ()))


def _remove_version(
    store: Store, prefix: str, kind: Kind, points_to: Callable[[], Collection[str]], before: datetime
) -> bool:
    manifest = {"Bucket": store.bucket, "Key": f"{prefix}{MANIFEST_NAME}"}
    original = manifest_bytes(store, f"s3://{store.bucket}/{prefix}{MANIFEST_NAME}")
    if kind == "begun" and original not in (None, TOMBSTONE):
        return False  # it has been published meanwhile, for whichever registry
    try:
        only_first = {"IfNoneMatch": "*"} if original is None else {}
        store.client.put_object(**manifest, Body=TOMBSTONE, **only_first, **store.put_options)
    except ClientError as error:
        if status_of(error) != 412:
            raise
        return False  # it has just been published
    objects = [entry for entry in objects_below(store, prefix) if entry["Key"] != manifest["Key"]]
    uploads = [*uploads_below(store, prefix)]
    if _newest([*objects, *uploads]) >= before or _is_pointed_to(store, prefix, points_to()):
        if original in (None, TOMBSTONE):
            store.client.delete_object(**manifest)
        else:
            store.client.put_object(**manifest, Body=original, ContentType="application/json", **store.put_options)
        return False
    for upload in uploads:
        abort_upload(store, upload)
    remove_objects(store, [entry["Key"] for entry in objects])
    store.client.delete_object(**manifest)
    return True
