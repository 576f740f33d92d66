"""Numbers for people: counts, bytes and durations in few digits."""

import math
from collections.abc import Sequence


def human_count(count: float) -> str:
    """A count with three digits: 12.3B, 4.56M, 812K, 95."""
    return "".join(_scaled(count, ("", "K", "M", "B", "T")))


def human_bytes(count: float) -> str:
    """Bytes in decimal units: 24.6 GB."""
    return " ".join(_scaled(count, ("B", "kB", "MB", "GB", "TB", "PB")))


def human_seconds(seconds: float) -> str:
    """A duration in its two largest units: 3 min 20 s."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.3g} s"


def counted(number: float, noun: str) -> str:
    """A number of things: 1 GPU, 2,048 GPUs."""
    return f"{number:,.12g} {noun}{'s' * (number > 1)}"


def human_age(seconds: float) -> str:
    """How long ago something was, in its largest unit: 3 d, 5 h, 12 min, 40 s."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def _scaled(count: float, units: Sequence[str]) -> tuple[str, str]:
    power = 0
    while power < len(units) - 1 and abs(float(f"{count:.3g}")) >= 1000:
        count, power = count / 1000, power + 1
    return f"{count:.3g}", units[power]


def fixed(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def per_second(rate: float) -> str:
    """Whole from 100 on, else to a tenth."""
    return fixed(rate, 0 if rate >= 100 else 1)


def percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{share * 100:.{digits}f} %"
