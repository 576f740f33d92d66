"""Who is champion: how a family gets there, why, and the way back.

Each registered model has a tag with its champions, oldest first: a promotion adds one, going back takes the last one
off, so that a second step back leads to the champion before the last two, whichever versions these were. A version has
a tag for when, by whom and why it was promoted, and one for when it was rolled back.

The alias `champion` alone says who is champion. Where a tag cannot be written, the alias and the tags that were written
go back. Where the process is killed between the two, a promotion is done and not recorded, as one by hand is; a
rollback is recorded and not done, and doing it again completes it.
"""

import getpass
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from elastic_core.schema import build
from tasks.settings import ServiceError
from tasks.tracking.registry import CHAMPION, FAMILY, REGISTRATION, ModelVersion, alias_moved, by_alias, versions_of
from tasks.tracking.tags import model_tags, tags_set

PROMOTED, ROLLED_BACK = "elastic.promoted", "elastic.rolled_back"
CHAMPIONS = "elastic.champions"
MOST_CHAMPIONS = 200  # that are remembered: MLflow's databases hold 5,000 characters of a tag


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
    """The rollback that took its place as champion from a version; None where it is champion, or was promoted since."""
    promoted, rolled_back = (change_of(version, tag) for tag in (PROMOTED, ROLLED_BACK))
    if rolled_back is None or CHAMPION in version.aliases:
        return None
    if promoted is not None and promoted.at > rolled_back.at:
        return None
    return rolled_back


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
    before = {name: _champion(uri, name) for name in versions}
    moved = {name: version for name, version in versions.items() if version != before[name]}
    records: dict[str, Mapping[str, str]] = {}
    for name, version in moved.items():
        known = _champions(uri, name)
        if not known or known[-1] != before[name]:  # moved by hand since
            known.append(before[name])
        records[f"{name}:{version}"] = {PROMOTED: _change(reason, by, before[name])}
        records[name] = {CHAMPIONS: json.dumps([*known, version][-MOST_CHAMPIONS:])}
    with alias_moved(uri, CHAMPION, moved), tags_set(uri, records):
        pass


def roll_back(uri: str, champions: Sequence[ModelVersion], reason: str) -> dict[str, int | None]:
    """Give each champion's place back to the version that it took the place from; all or none, by model.

    None for a model that had no champion before: it has none afterwards. A champion that nothing records, since the
    alias was moved by hand, gives its place to the last one that was recorded. ServiceError where it is not recorded
    who was champion before, or where all models would be without one.
    """
    to: dict[str, int | None] = {}
    records: dict[str, Mapping[str, str]] = {}
    for champion in champions:
        before = _champions(uri, champion.name)
        if before and before[-1] == champion.version:
            before.pop()
        if not before:
            raise ServiceError(
                f"{champion.name}:{champion.version} does not say which version it replaced; name one by "
                f"`elastic promote {champion.name}:VERSION`"
            )
        to[champion.name] = before[-1]
        records[champion.name] = {CHAMPIONS: json.dumps(before)}
        records[f"{champion.name}:{champion.version}"] = {ROLLED_BACK: _change(reason, None, before[-1])}
    if not any(to.values()):
        first = champions[0]
        raise ServiceError(f"{first.name}:{first.version} replaced no other champion, so there is none to go back to")
    with tags_set(uri, records), alias_moved(uri, CHAMPION, to):
        pass
    return to


def _champion(uri: str, name: str) -> int | None:
    champion = by_alias(uri, name, CHAMPION)
    return None if champion is None else champion.version


def _champions(uri: str, name: str) -> list[int | None]:
    """The champions of a model that are recorded, oldest first; None stands for a time without one."""
    recorded = json.loads(model_tags(uri, name).get(CHAMPIONS, "[]"))
    return list(build(tuple[int | None, ...], recorded, f"{name} {CHAMPIONS}"))


def _change(reason: str, by: str | None, other: int | None) -> str:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps(asdict(Change(at=at, by=by or _user(), reason=reason, other=other)))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
