"""A disk that is full."""

from pathlib import Path


def fill(file: Path) -> Path:
    """Write to a file until its disk has no room left."""
    with file.open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            return file
