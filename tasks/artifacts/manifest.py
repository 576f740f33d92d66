"""The manifest of a published version: what it holds, and every check of one that came from outside.

Pure: no network, no file. `tasks.artifacts` stores and obeys manifests.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic_core.schema import NAME
from tasks.settings import ServiceError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILES = 10_000
MAX_OBJECT_BYTES = 5 << 40  # S3's own limit
MAX_PATH_BYTES = 900  # S3 takes 1024 for the whole key
MAX_DEPTH = 16

REGISTRY = "registry"  # in a manifest's metadata: the `id` and the `uri` of the registry that points to the version

# Stands in a manifest's place while `elastic gc` removes the version, so that nobody can publish or read it.
TOMBSTONE = b'{"removed by": "elastic gc"}\n'

_REQUIRED = {"format_version", "family", "version", "files", "metadata"}
_OPTIONAL = {"nested", "signature"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[A-Za-z0-9+/]{86}==")
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file: its path relative to the version (or directory), with "/" between names; size in bytes; SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedPart:
    """A part that is stored as a shell: `files` is what its directory has once it is put together (nested.py)."""

    name: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a version holds: `files` are its objects, `nested` its parts from the smallest where those are shells.

    `metadata` is free JSON: lineage, budgets, parameters. `signature` is of everything else, base64, or empty.
    """

    family: str
    version: str
    files: tuple[FileRecord, ...]
    metadata: Mapping[str, Any]
    nested: tuple[NestedPart, ...] = ()
    signature: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        names = {part.name for part in self.nested} or {file.path.partition("/")[0] for file in self.files}
        return tuple(sorted(names))

    def part(self, name: str) -> tuple[FileRecord, ...]:
        """The files of one part as it is fetched, with paths relative to it."""
        if self.nested:
            return next((part.files for part in self.nested if part.name == name), ())
        return self.stored(name)

    def stored(self, name: str) -> tuple[FileRecord, ...]:
        """The objects of one part, with paths relative to it."""
        prefix = f"{name}/"
        return tuple(
            FileRecord(path=file.path.removeprefix(prefix), size=file.size, sha256=file.sha256)
            for file in self.files
            if file.path.startswith(prefix)
        )

    def up_to(self, name: str) -> tuple[NestedPart, ...]:
        """A nested part and all below it, from the smallest; nothing where parts are stored whole."""
        names = [part.name for part in self.nested]
        return self.nested[: names.index(name) + 1] if name in names else ()


def directory_digest(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over a directory's files: the path and the SHA-256 of each, in the order of `sorted(Path)`."""
    return hashlib.sha256("".join(f"{path}\0{sha256}\n" for path, sha256 in files).encode()).hexdigest()


def manifest_json(manifest: Manifest) -> bytes:
    """The one spelling of a manifest, so that equal manifests are equal bytes."""
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "family": manifest.family,
        "version": manifest.version,
        "files": [_plain(file) for file in manifest.files],
        "metadata": manifest.metadata,
    }
    if manifest.nested:
        document["nested"] = [
            {"name": part.name, "files": [_plain(file) for file in part.files]} for part in manifest.nested
        ]
    if manifest.signature:
        document["signature"] = manifest.signature
    body = (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    if len(body) > MAX_MANIFEST_BYTES:
        raise ValueError(f"the manifest has {len(body)} bytes; {MAX_MANIFEST_BYTES} at most: put less in its metadata")
    return body


def _plain(file: FileRecord) -> dict[str, Any]:
    return {"path": file.path, "size": file.size, "sha256": file.sha256}


def parse_manifest(body: bytes, where: str) -> Manifest:
    """Check all that a manifest says before any of it is used; a ServiceError names `where`, the field and the rule."""
    document = _document(body, where)
    family, version, files, metadata = (document[key] for key in ("family", "version", "files", "metadata"))
    for what, value in (("family", family), ("version", version)):
        _check_name(where, what, value)
    if not isinstance(metadata, dict):
        raise ServiceError(f"{where}: metadata is {metadata!r:.80}; it must be an object")
    nested, signature = document.get("nested", []), document.get("signature", "")
    if not isinstance(nested, list) or ("nested" in document and not nested):
        raise ServiceError(f"{where}: nested is {nested!r:.80}; it must be a list of at least one part")
    if "signature" in document and (not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature)):
        raise ServiceError(f"{where}: signature is {signature!r:.80}; it must be 64 bytes in base64")
    return Manifest(
        family=family,
        version=version,
        files=_file_records(files, where),
        metadata=metadata,
        nested=_nested_parts(nested, where),
        signature=signature,
    )


def _document(body: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(body, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"{where} is not a manifest: malformed JSON ({str(error)[:100]})") from error
    if not isinstance(document, dict) or "format_version" not in document:
        raise ServiceError(f"{where} is not a manifest: it has no format_version")
    found = document["format_version"]
    if type(found) is not int or found != FORMAT_VERSION:
        raise ServiceError(
            f"{where}: format_version is {found!r:.40}, this program reads {FORMAT_VERSION}; upgrade elastic-family"
        )
    if not _REQUIRED <= document.keys() <= _REQUIRED | _OPTIONAL:
        raise ServiceError(
            f"{where} is not a manifest: its fields must be {', '.join(sorted(_REQUIRED))}, and may be "
            f"{', '.join(sorted(_OPTIONAL))}"
        )
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key appears twice")
    return mapping


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_name(where: str, what: str, value: object) -> None:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ServiceError(f"{where}: {what} {value!r:.80} is not a name")


def _nested_parts(entries: list[object], where: str) -> tuple[NestedPart, ...]:
    parts = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"name", "files"}:
            raise ServiceError(f"{where}: a nested part is {entry!r:.120}; it must have exactly name and files")
        _check_name(where, "nested part", entry["name"])
        parts.append(NestedPart(name=entry["name"], files=_file_records(entry["files"], where)))
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ServiceError(f"{where}: nested parts {names!r:.120} must have each name once")
    return tuple(parts)


def _file_records(entries: object, where: str) -> tuple[FileRecord, ...]:
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_FILES:
        raise ServiceError(f"{where}: files must be a list of 1 to {MAX_FILES} entries")
    records = tuple(_file_record(entry, where) for entry in entries)
    try:
        check_paths([record.path for record in records], where)
    except ValueError as error:
        raise ServiceError(str(error)) from error
    return records


def _file_record(entry: object, where: str) -> FileRecord:
    if not isinstance(entry, dict) or entry.keys() != {"path", "size", "sha256"}:
        raise ServiceError(f"{where}: a file entry is {entry!r:.120}; it must have exactly path, size and sha256")
    path, size, sha256 = entry["path"], entry["size"], entry["sha256"]
    if not isinstance(path, str):
        raise ServiceError(f"{where}: path {path!r:.120} is not a string")
    if type(size) is not int or not 0 <= size <= MAX_OBJECT_BYTES:
        raise ServiceError(f"{where}: size of {path!r:.120} is {size!r:.40}; it must be 0 to {MAX_OBJECT_BYTES}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ServiceError(f"{where}: sha256 of {path!r:.120} is {sha256!r:.80}; it must be 64 lower-case hex digits")
    return FileRecord(path=path, size=size, sha256=sha256)


def check_paths(paths: Iterable[str], where: str) -> None:
    """Refuse paths that could leave a directory, that two systems would read differently, or that collide."""
    files: set[str] = set()
    directories: set[str] = set()
    for path in paths:
        components = path.split("/")
        if any(part in ("", ".", "..") for part in components):
            raise ValueError(f"{where}: path {path!r:.120} is absolute or has an empty, '.' or '..' component")
        if "\\" in path or _DRIVE.match(path) or not path.isprintable():
            raise ValueError(f"{where}: path {path!r:.120} has a backslash, a drive letter or a control character")
        if len(components) > MAX_DEPTH or len(path.encode()) > MAX_PATH_BYTES:
            raise ValueError(f"{where}: path {path!r:.120} is over {MAX_PATH_BYTES} bytes or {MAX_DEPTH} levels")
        # A Mac's file system takes these for one name.
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in files:
            raise ValueError(f"{where}: path {path!r:.120} appears twice")
        files.add(folded)
        directories.update(folded.rsplit("/", depth)[0] for depth in range(1, len(components)))
    both = sorted(files & directories)
    if both:
        raise ValueError(f"{where}: path {both[0]!r:.120} is a file and a directory")
