"""Nested storage: what is stored of each part of a family, and how a part is put together again.

The parts are the slices from the smallest and then the whole family. Each is stored as its shell over the one before;
the smallest as it is, a stock checkpoint. Files that an earlier part has too are stored once. Here is the work on local
files; `tasks.artifacts` brings them to S3 and back.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.artifacts.manifest import FileRecord, Manifest, NestedPart
from tasks.artifacts.staging import holds_exactly, inside, sha256_of
from tasks.settings import ServiceError

if TYPE_CHECKING:  # torch is not loaded where nothing is put together
    from elastic_core.geometry import ModelConfig
    from elastic_core.subnet import Subnet

_WEIGHTS = re.compile(r"model[^/]*\.safetensors(\.index\.json)?")
_SHELL = re.compile(r"shell\.json|shell[^/]*\.safetensors")


# Storing


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A part to store: its directory, with files `instead` of some of it, and which part of the whole model it is."""

    name: str
    directory: Path
    subnet: "Subnet"
    instead: Mapping[str, Path] = field(default_factory=dict)


def store(
    members: Sequence[Member], model: "ModelConfig", scratch: Path
) -> tuple[dict[str, Path], tuple[NestedPart, ...]]:
    """Write into `scratch` what is to be stored of each member, the smallest first; directories and records by part.

    Every member is put together once from what was written, and compared: what cannot be had back is not stored.
    """
    from elastic_core.files.checkpoint import read_config
    from elastic_core.files.shells import write_shell
    from elastic_core.subnet import full_subnet, within

    directories: dict[str, Path] = {}
    parts: list[NestedPart] = []
    stored: set[tuple[str, int]] = set()
    below: Subnet | None = None
    for member in members:
        part = NestedPart(name=member.name, files=tuple(_records(member)))
        own = within(member.subnet, member.subnet, model)
        if below is None and own == full_subnet(read_config(member.directory)):
            directories[member.name] = member.directory
        else:
            directories[member.name] = target = scratch / member.name
            inner = None if below is None else within(below, member.subnet, model)
            write_shell(member.directory, target, own=own, below=inner)
            for file in part.files:
                if not _WEIGHTS.fullmatch(file.path) and _content(file) not in stored:
                    shutil.copyfile(_source(member, file.path), inside(target, file.path))
            _check(part, member.directory, tuple(directories.values()), scratch)
        stored |= {_content(file) for file in part.files}
        parts.append(part)
        below = member.subnet
    return directories, tuple(parts)


def _source(member: Member, relative: str) -> Path:
    return member.instead.get(relative, member.directory / relative)


def _records(member: Member) -> Iterator[FileRecord]:
    for found in sorted(path for path in member.directory.rglob("*") if path.is_file()):
        relative = found.relative_to(member.directory).as_posix()
        path = _source(member, relative)
        yield FileRecord(path=relative, size=path.stat().st_size, sha256=sha256_of(path))


def _check(part: NestedPart, source: Path, chain: Sequence[Path], scratch: Path) -> None:
    work = scratch / f".check-{part.name}"
    work.mkdir()
    shutil.copyfile(source / "config.json", work / "config.json")
    put_together(work, chain, [file for file in part.files if _WEIGHTS.fullmatch(file.path)], str(source))
    shutil.rmtree(work)


def _content(file: FileRecord) -> tuple[str, int]:
    return file.sha256, file.size


# Fetching


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What brings a part here.

    `files` are objects to fetch, by their paths in the new directory, and `aside` those to fetch beside it, in one
    directory a shell; `copied` are files that are here already. The `assembled` files come from the shells in `chain`,
    from the smallest: paths beside the directory; the first may be a slice that is here, by its absolute path.
    """

    files: Mapping[str, FileRecord]
    aside: Mapping[str, FileRecord] = field(default_factory=dict)
    copied: Mapping[str, Path] = field(default_factory=dict)
    assembled: tuple[FileRecord, ...] = ()
    chain: tuple[Path, ...] = ()

    @property
    def objects(self) -> tuple[FileRecord, ...]:
        return (*self.files.values(), *self.aside.values())


def smaller_in(directory: Path, manifest: Manifest, name: str) -> NestedPart | None:
    """The part below `name` that `directory` holds, byte for byte and nothing else; None where it holds none."""
    below = manifest.up_to(name)[:-1]
    return next((part for part in reversed(below) if holds_exactly(directory, part.files)), None)


def plan(manifest: Manifest, name: str, base: NestedPart | None, directory: Path) -> Plan:
    """How to bring a part to `directory`, which holds the smaller part `base` if that is not None.

    A ServiceError where the manifest promises a file that can come from nowhere.
    """
    parts = manifest.up_to(name)
    if not parts:
        return Plan(files={file.path: _stored_in(name, file) for file in manifest.stored(name)})
    objects = {_content(file): file for file in manifest.files}
    here = {_content(file): directory / file.path for file in base.files} if base else {}
    files, copied, assembled = {}, {}, []
    for file in parts[-1].files:
        if (content := _content(file)) in here:
            copied[file.path] = here[content]
        elif content in objects:
            files[file.path] = objects[content]
        elif _WEIGHTS.fullmatch(file.path):
            assembled.append(file)
        else:
            raise ServiceError(f"{name}/{file.path} of {manifest.version} is not stored, and shells only make weights")
    if not assembled:
        return Plan(files=files, copied=copied)
    fetched = parts[parts.index(base) + 1 :] if base else parts
    return Plan(
        files=files,
        aside={
            f"{part.name}/{file.path}": _stored_in(part.name, file)
            for part in fetched
            for file in _shell_files(manifest.stored(part.name))
        },
        copied=copied,
        assembled=tuple(assembled),
        chain=(*([directory] if base else []), *(Path(part.name) for part in fetched)),
    )


def _stored_in(part: str, file: FileRecord) -> FileRecord:
    return FileRecord(path=f"{part}/{file.path}", size=file.size, sha256=file.sha256)


def _shell_files(stored: Sequence[FileRecord]) -> list[FileRecord]:
    """The files that a shell is made of; of a slice that is stored as it is, those that make it a checkpoint."""
    shell = [file for file in stored if _SHELL.fullmatch(file.path)]
    return shell or [file for file in stored if file.path == "config.json" or _WEIGHTS.fullmatch(file.path)]


def put_together(
    work: Path,
    chain: Sequence[Path],
    expected: Sequence[FileRecord],
    where: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the weights of the slice whose config.json is in `work`; a ServiceError where others are expected."""
    from elastic_core.files.shells import assemble

    try:
        assemble(work, chain, progress=progress)
    except ValueError as error:
        raise ServiceError(f"{where} cannot be put together: {error}") from error
    for file in expected:
        path = work / file.path
        if not path.exists() or path.stat().st_size != file.size or sha256_of(path) != file.sha256:
            raise ServiceError(f"{where} cannot be put together: its shells make another {file.path}")
