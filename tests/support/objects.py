"""Directories of made-up files, and what a store sends while a test looks on."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tasks.artifacts import REGISTRY, Store, manifest_uri, parse_uri, publish
from tasks.artifacts.connection import head
from tasks.artifacts.manifest import Manifest

MIB = 1 << 20
PART = 5 * MIB  # the fixture's, and the smallest that S3 takes
MARK = {REGISTRY: {"id": "ours", "uri": "sqlite:///ours.db"}}  # the registry that made-up versions are for
SMALL, LARGE = 100_007, 2 * PART + 7  # bytes of a file that is sent whole, and of one in three parts


def make(directory: Path, files: dict[str, bytes]) -> Path:
    for relative, content in files.items():
        path = directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@cache
def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def checkpoint(size: int = SMALL, seed: int = 0) -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "nemotron_h"}',
        "model-00001.safetensors": noise(size, seed),
        "model-00002.safetensors": noise(SMALL // 2, seed + 1),
        "empty": b"",
        "tokenizer/vocab ü.json": b"{}",
    }


def publish_one(store: Store, directory: Path, version: str = "1", **options: Any) -> Manifest:
    metadata = {"step": 7, **MARK}
    return publish(store, family="nano", version=version, directories={"s": directory}, metadata=metadata, **options)


def uri_of(store: Store, version: str = "1") -> str:
    return manifest_uri(store.bucket, "nano", version)


def stored(store: Store) -> dict[str, int]:
    """Every object of the bucket, with its bytes."""
    pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket)
    return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}


def exists(store: Store, uri: str) -> bool:
    """Whether there is an object at this URI."""
    bucket, key = parse_uri(uri)
    return head(replace(store, bucket=bucket), key) is not None


@contextmanager
def requests_of(store: Store) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The S3 operations sent while the block runs, with their parameters."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        seen.append((model.name, dict(params)))

    store.client.meta.events.register("before-parameter-build.s3.*", note)
    try:
        yield seen
    finally:
        store.client.meta.events.unregister("before-parameter-build.s3.*", note)


@contextmanager
def bytes_of(store: Store) -> Iterator[list[int]]:
    """The bytes of every body that is fetched while the block runs."""
    seen: list[int] = []

    def note(parsed: dict[str, Any], **_: Any) -> None:
        seen.append(parsed.get("ContentLength", 0))

    store.client.meta.events.register("after-call.s3.GetObject", note)
    try:
        yield seen
    finally:
        store.client.meta.events.unregister("after-call.s3.GetObject", note)


@contextmanager
def failing(store: Store, operation: str, on_call: int) -> Iterator[None]:
    """Make one call of an operation fail as if the connection to S3 were lost."""
    calls = iter(range(1, 1_000_000))

    def fail(**_: Any) -> None:
        if next(calls) == on_call:
            raise ConnectionResetError("injected")

    event = f"before-parameter-build.s3.{operation}"
    store.client.meta.events.register(event, fail)
    try:
        yield
    finally:
        store.client.meta.events.unregister(event, fail)
