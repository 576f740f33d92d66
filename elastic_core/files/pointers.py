"""Git LFS leaves a short text in a file's place until the file is fetched; nobody may take that text for the file."""

from pathlib import Path
from typing import BinaryIO

FAULT = "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
_BEGINS, _MAX_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def pointer_fault(path: Path) -> str:
    """What is wrong with a file that is a pointer of Git LFS, in one line; "" for any other file."""
    if path.stat().st_size > _MAX_BYTES:
        return ""
    with path.open("rb") as file:
        return f"{path}: {FAULT}" if is_pointer(file) else ""


def is_pointer(file: BinaryIO) -> bool:
    """Whether a file that is open at its beginning, and stays there, is a pointer."""
    begins = file.read(len(_BEGINS))
    file.seek(0)
    return begins == _BEGINS
