"""Git LFS leaves a short text in a file's place until the file is fetched; nobody may take that text for the file."""

from pathlib import Path

_BEGINS, _MAX_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def pointer_fault(path: Path) -> str:
    """What is wrong with a file that is a pointer of Git LFS, in one line; "" for any other file."""
    if path.stat().st_size > _MAX_BYTES:
        return ""
    with path.open("rb") as file:
        is_pointer = file.read(len(_BEGINS)) == _BEGINS
    return f"{path}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`" if is_pointer else ""
