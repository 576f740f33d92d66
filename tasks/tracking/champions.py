"""Who is champion: how a family gets there, why, and the way back.

A promotion is recorded as a tag on each version that becomes champion, with the version whose place it takes. Going
back follows these records, so that a second step back leads to the champion before the last two.
"""

import getpass
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from elastic_core.files.locks import held
from elastic_core.schema import build
from tasks.settings import ServiceError
from tasks.tracking.registry import (
    CHAMPION,
    FAMILY,
    REGISTRATION,
    ModelVersion,
    by_alias,
    move_alias,
    tag_versions,
    versions_of,
)

PROMOTED, ROLLED_BACK = "elastic.promoted", "elastic.rolled_back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A move of the alias `champion`: when (ISO 8601, UTC), by whom and why; `other` is the version before or after.

    `other` is None where there was no champion before, or is none afterwards.
    """

    at: str
    by: str
    reason: str
    other: int | None = None


def change_of(version: ModelVersion, tag: str) -> Change | None:
    """What the tag PROMOTED or ROLLED_BACK of a version says; None where it has none."""
    text = version.tags.get(tag)
    return None if text is None else build(Change, json.loads(text), f"{version.name}:{version.version} {tag}")


def withdrawn(version: ModelVersion) -> Change | None:
    """The rollback that took a version's place as champion from it; None where a promotion has come since."""
    promoted, rolled_back = (change_of(version, tag) for tag in (PROMOTED, ROLLED_BACK))
    if rolled_back is None or (promoted is not None and promoted.at > rolled_back.at):
        return None
    return rolled_back


def one_promotion(home: Path, family: str) -> AbstractContextManager[None]:
    """Held while a family's champion is compared and moved, by one process at a time of a state directory."""
    return held(home / "locks" / f"promote-{family}", waits=f"waiting for {family}, which another run is promoting")


def registered_with(uri: str, version: ModelVersion) -> list[ModelVersion]:
    """This version, and then those of the other budgets that were registered together with it, by name.

    The same parts under the name of another family have the same registration.
    """
    registration, family = version.tags.get(REGISTRATION), version.tags.get(FAMILY)
    alike = [version] if registration is None else versions_of(uri, REGISTRATION, registration)
    found = [other for other in alike if other.tags.get(FAMILY) == family]
    return sorted(found, key=lambda other: (other.name != version.name, other.name))


def promote(uri: str, versions: Mapping[str, int], reason: str, by: str | None = None) -> None:
    """Make versions, by the names of their models, the champions, all or none, and record the reason on each."""
    for name, version in versions.items():
        before = by_alias(uri, name, CHAMPION)
        if before is None or before.version != version:
            change = _change(reason, by, None if before is None else before.version)
            tag_versions(uri, [f"{name}:{version}"], {PROMOTED: change})
    move_alias(uri, CHAMPION, versions)


def roll_back(uri: str, champions: Sequence[ModelVersion], reason: str) -> dict[str, int | None]:
    """Give each champion's place back to the version that it took the place from; all or none, by model.

    None for a model that had no champion before: it has none afterwards. ServiceError where it is not recorded who was
    champion before, or where all models would be without one.
    """
    to: dict[str, int | None] = {}
    for champion in champions:
        promoted = change_of(champion, PROMOTED)
        if promoted is None:
            raise ServiceError(
                f"{champion.name}:{champion.version} does not say which version it replaced; name one by "
                f"`elastic promote {champion.name}:VERSION`"
            )
        to[champion.name] = promoted.other
    if not any(to.values()):
        first = champions[0]
        raise ServiceError(f"{first.name}:{first.version} replaced no other champion, so there is none to go back to")
    for champion in champions:
        change = _change(reason, None, to[champion.name])
        tag_versions(uri, [f"{champion.name}:{champion.version}"], {ROLLED_BACK: change})
    move_alias(uri, CHAMPION, to)
    return to


def _change(reason: str, by: str | None, other: int | None) -> str:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps(asdict(Change(at=at, by=by or _user(), reason=reason, other=other)))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
