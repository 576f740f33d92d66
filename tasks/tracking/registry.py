"""Registered models: a family's versions, all or none, their aliases, and what they point to."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from elastic_core.schema import NAME, checked_name
from tasks.settings import ServiceError, redact
from tasks.tracking.connection import client_of, explained, first_line, is_server, page_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

NUMBER = "{number}"
HELDOUT_DIGEST = "elastic.heldout_sha256"
MEASURED = "elastic.measured_sha256"
FAMILY, VERSION, BUDGET, MANIFEST = "elastic.family", "elastic.version", "elastic.budget", "elastic.manifest"
REGISTRATION = "elastic.registration"
PARAMS, SUBNET, STORAGE, STORED = "elastic.params", "elastic.subnet", "elastic.storage", "elastic.stored_bytes"
PULL, LOADS = "elastic.pull", "elastic.loads"
ANSWERED = "elastic.answered."  # before a benchmark's name: what answered it
JUDGED = "elastic.judged."  # before a benchmark's name: the digest of how it was judged
CONDITIONS, PREFECT_RUN = "elastic.measured_under", "elastic.prefect_run"
METRIC_PREFIX = "metric."
CANDIDATE, CHAMPION = "candidate", "champion"
VERSIONS_A_PAGE, MODELS_A_PAGE = 1000, 100
VERSIONS_SHOWN = 10
FIRST_EXPERIMENT = "0"  # MLflow makes it with its database

_log = logging.getLogger(__name__)

_REFERENCE = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<alias>[A-Za-z0-9_-]+)|[:/](?P<version>[0-9]{1,9}))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One budget to register: the s3:// directory of its checkpoint, and what is known of it.

    In its tags and its description NUMBER stands for the version that MLflow gives it.
    """

    budget: str
    source: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """A version of a registered model as MLflow holds it; `metrics` are read from its tags.

    `created` is in seconds since 1970.
    """

    name: str
    version: int
    created: float
    source: str
    run_id: str
    description: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    aliases: tuple[str, ...]


def model_name(family: str, budget: str) -> str:
    """The registered model of a budget; ValueError for names that MLflow or S3 would read differently."""
    return f"{checked_name('family', family)}-{checked_name('budget', budget)}"


def model_url(uri: str, model: str) -> str | None:
    """The page of a registered version, NAME:VERSION; None where MLflow is a database with no server."""
    if not is_server(uri):
        return None
    return page_of(uri, f"models/{model.replace(':', '/versions/')}")


def identity(uri: str) -> str:
    """What tells this registry from others: when its first experiment was made, which is the same by any URI.

    The URI itself, redacted, where there is no such experiment.
    """
    from mlflow.exceptions import MlflowException

    with explained(uri, "asking which registry this is"):
        try:
            made = client_of(uri).get_experiment(FIRST_EXPERIMENT).creation_time
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            made = None
    return str(made) if made else redact(uri)


def register_family(
    uri: str,
    *,
    family: str,
    version: str,
    manifest_uri: str,
    run_id: str,
    members: Sequence[Member],
    registration: str = "",
) -> dict[str, ModelVersion]:
    """Make a version of every budget's model, all or none, and move the alias `candidate` to them; by budget.

    Versions carry `registration` as a tag (the family's version, if nothing else is given), so that a repeated call
    finds what an earlier one made. Registrations of the same files share the family's version.
    """
    registration = registration or version
    names = {member.budget: model_name(family, member.budget) for member in members}
    if not names or not NAME.fullmatch(version):
        raise ValueError(f"family {family!r} version {version!r} needs a plain version name and at least one budget")
    with explained(uri, f"registering version {version!r} of family {family!r}"):
        client = client_of(uri)
        before = {
            name: {int(entry.version) for entry in _tagged(client, name, registration)} for name in names.values()
        }
        identifying = {FAMILY: family, VERSION: version, MANIFEST: manifest_uri, REGISTRATION: registration}
        try:
            made = {
                member.budget: _register(client, names[member.budget], identifying, run_id, member)
                for member in members
            }
        except BaseException:
            _unregister(client, registration, before)
            raise
        candidates = [int(_aliases(client, entry.name).get(CANDIDATE, 0)) for entry in made.values()]
    # A late repetition must not take the alias back from a newer family.
    if any(candidate < entry.version for candidate, entry in zip(candidates, made.values(), strict=True)):
        set_alias(uri, CANDIDATE, {entry.name: entry.version for entry in made.values()})
    return made


def are_registered(uri: str, models: Collection[str], registration: str) -> bool:
    """Whether all of these registered versions, each NAME:VERSION, are there and were made by this registration."""
    with explained(uri, f"looking up {', '.join(models)}"):
        client = client_of(uri)
        named = [model.rsplit(":", 1) for model in models]
        return all(
            number in {str(entry.version) for entry in _tagged(client, name, registration)} for name, number in named
        )


def champion(uri: str, name: str) -> ModelVersion | None:
    """The version of a model that the alias `champion` points at, with its metrics; None if there is none."""
    return by_alias(uri, name, CHAMPION)


def by_alias(uri: str, name: str, alias: str) -> ModelVersion | None:
    with explained(uri, f"looking up {name}@{alias}"):
        client = client_of(uri)
        version = _aliases(client, name).get(alias)
        return None if version is None else _model_version(client.get_model_version(name, version))


def set_alias(uri: str, alias: str, versions: Mapping[str, int]) -> None:
    """Move an alias on several models (by name) together: where one cannot be moved, the moved ones go back."""
    with alias_moved(uri, alias, versions):
        pass


@contextmanager
def alias_moved(uri: str, alias: str, versions: Mapping[str, int | None]) -> Iterator[None]:
    """As `set_alias`, and the moved ones go back where the block fails too; None takes the alias from a model."""
    with explained(uri, f"moving alias {alias!r} of {', '.join(versions)}"):
        client = client_of(uri)
        before = {name: _aliases(client, name).get(alias) for name in versions}
        try:
            for name, version in versions.items():
                _point(client, name, alias, version)
            yield
        except BaseException:
            _put_back(client, alias, before)
            raise


def versions_of(uri: str, tag: str, value: str | None = None) -> list[ModelVersion]:
    """All registered versions that have a tag of ours, with this value if one is given."""
    query = f"tags.`{tag}` LIKE '%'" if value is None else f"tags.`{tag}` = '{checked_name(tag, value)}'"
    found: list[ModelVersion] = []
    with explained(uri, "listing registered versions"):
        client, token = client_of(uri), None
        while True:
            page = client.search_model_versions(query, max_results=VERSIONS_A_PAGE, page_token=token)
            found += map(_model_version, page)
            token = page.token
            if not token:
                break
        pointing = {name: _aliases(client, name) for name in {version.name for version in found}}
    # MLflow's search leaves out the aliases.
    return [
        replace(
            version, aliases=tuple(a for a, number in pointing[version.name].items() if number == str(version.version))
        )
        for version in found
    ]


def pointed_to(uri: str) -> set[str]:
    """The URIs that any version of any registered model points to: of its directory and of its family's manifest."""
    found: set[str] = set()
    with explained(uri, "listing all registered versions"):
        client, token = client_of(uri), None
        while True:
            page = client.search_model_versions(max_results=VERSIONS_A_PAGE, page_token=token)
            for entry in page:
                found |= {where for where in (entry.source, entry.tags.get(MANIFEST)) if where}
            token = page.token
            if not token:
                return found


def aliased(uri: str) -> set[str]:
    """The registrations that are a candidate or a champion of any model."""
    found: set[str] = set()
    with explained(uri, "listing candidates and champions"):
        client, token = client_of(uri), None
        while True:
            page = client.search_registered_models(max_results=MODELS_A_PAGE, page_token=token)
            for model in page:
                for alias, number in model.aliases.items():
                    if alias in (CANDIDATE, CHAMPION):
                        tags = client.get_model_version(model.name, str(number)).tags
                        found |= {tags[REGISTRATION]} if REGISTRATION in tags else set()
            token = page.token
            if not token:
                return found


def resolve(uri: str, reference: str, alone: Sequence[str] = (CHAMPION,)) -> ModelVersion:
    """The registered version that NAME, NAME@ALIAS or NAME:VERSION means.

    NAME alone is its champion, or what the first of the aliases `alone` that it has points at.
    Its tags MANIFEST and BUDGET say what `artifacts.fetch` needs.
    """
    from mlflow.exceptions import MlflowException

    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference!r} is not a model; write NAME, NAME@ALIAS or NAME:VERSION")
    name = match["name"]
    with explained(uri, f"looking up {reference}"):
        client = client_of(uri)
        aliases = _aliases(client, name)
        wanted = [match["alias"]] if match["alias"] else alone
        number = match["version"] or next((aliases[alias] for alias in wanted if alias in aliases), None)
        if number is None:
            raise ServiceError(f"{reference} is not in MLflow: {_instead(uri, name, aliases)}")
        try:
            found = _model_version(client.get_model_version(name, str(number)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            instead = _versions_text(client, name) or _instead(uri, name, aliases)
            raise ServiceError(f"{reference} is not in MLflow: {instead}") from None
    if not {MANIFEST, BUDGET} <= found.tags.keys():
        raise ServiceError(f"{name} version {number} was not registered by elastic: its tag {MANIFEST} is missing")
    return found


def _instead(uri: str, name: str, aliases: Collection[str]) -> str:
    """What there is, where a name means no version."""
    if aliases:
        return f"the aliases of {name!r} are {', '.join(sorted(aliases))}"
    sizes = sorted({version.name for version in versions_of(uri, FAMILY, name)})
    return f"{name!r} is a family, of {', '.join(sizes)}" if sizes else f"it has no {name!r}"


def _versions_text(client: "MlflowClient", name: str) -> str:
    """The versions that a model has, the newest first; nothing where it has none."""
    entries = client.search_model_versions(f"name = '{name}'", max_results=VERSIONS_A_PAGE)
    numbers = sorted((int(entry.version) for entry in entries), reverse=True)
    shown = ", ".join(map(str, numbers[:VERSIONS_SHOWN])) + ", ..." * (len(numbers) > VERSIONS_SHOWN)
    return f"the versions of {name!r} are {shown}" if numbers else ""


def _register(
    client: "MlflowClient", name: str, identifying: Mapping[str, str], run_id: str, member: Member
) -> ModelVersion:
    registration, manifest_uri = identifying[REGISTRATION], identifying[MANIFEST]
    found = _tagged(client, name, registration)
    if not found:
        _ensure_model(client, name, f"Budget {member.budget} of the elastic family {identifying[FAMILY]}.")
        metrics = {f"{METRIC_PREFIX}{key}": repr(float(value)) for key, value in member.metrics.items()}
        client.create_model_version(
            name,
            member.source,
            run_id=run_id,
            tags={**member.tags, **metrics, **identifying, BUDGET: member.budget},
            description=member.description,
            await_creation_for=0,
        )
        found = _tagged(client, name, registration)
    _fill_in_number(client, found[0])
    for twin in found[1:]:  # a create whose answer was lost is sent again
        _delete_version(client, name, str(twin.version))
    entry = _model_version(client.get_model_version(name, str(found[0].version)))
    if (entry.source, entry.tags[MANIFEST]) != (member.source, manifest_uri):
        raise ServiceError(f"{name} has {registration!r} with other files, {entry.source}: use a new version")
    return entry


def _fill_in_number(client: "MlflowClient", entry: Any) -> None:
    """Write its number into the texts of a new version; where that is done already, nothing changes."""
    number = str(entry.version)
    for key, value in entry.tags.items():
        if NUMBER in value:
            client.set_model_version_tag(entry.name, number, key, value.replace(NUMBER, number))
    if NUMBER in (entry.description or ""):
        client.update_model_version(entry.name, number, entry.description.replace(NUMBER, number))


def _unregister(client: "MlflowClient", registration: str, before: Mapping[str, set[int]]) -> None:
    """Take back what a failed registration made, by name; what MLflow cannot do now, the next attempt completes."""
    from mlflow.exceptions import MlflowException

    for name, kept in before.items():
        try:
            for entry in _tagged(client, name, registration):
                if int(entry.version) not in kept:
                    _delete_version(client, name, str(entry.version))
            if not client.search_model_versions(f"name = '{name}'", max_results=1):
                client.delete_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                _log.warning("%s keeps a version of a failed registration: %s", name, first_line(error))


def _delete_version(client: "MlflowClient", name: str, version: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # as the second answer says where the first was lost
            raise


def _put_back(client: "MlflowClient", alias: str, before: Mapping[str, str | None]) -> None:
    from mlflow.exceptions import MlflowException

    for name, version in before.items():
        try:
            _point(client, name, alias, version)
        except MlflowException as error:
            _log.warning("alias %s of %s could not be put back: %s", alias, name, first_line(error))


def _point(client: "MlflowClient", name: str, alias: str, version: int | str | None) -> None:
    if version is None:
        client.delete_registered_model_alias(name, alias)
    else:
        client.set_registered_model_alias(name, alias, str(version))


def _ensure_model(client: "MlflowClient", name: str, description: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _tagged(client: "MlflowClient", name: str, registration: str) -> list[Any]:
    """The versions of a model that a registration made, oldest first."""
    query = f"name = '{name}' AND tags.`{REGISTRATION}` = '{registration}'"
    return sorted(client.search_model_versions(query), key=lambda entry: int(entry.version))


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _model_version(entry: Any) -> ModelVersion:
    metrics = {
        key.removeprefix(METRIC_PREFIX): float(value)
        for key, value in entry.tags.items()
        if key.startswith(METRIC_PREFIX)
    }
    return ModelVersion(
        name=entry.name,
        version=int(entry.version),
        created=entry.creation_timestamp / 1000,
        source=entry.source,
        run_id=entry.run_id or "",
        description=entry.description or "",
        tags=dict(entry.tags),
        metrics=metrics,
        aliases=tuple(entry.aliases),
    )
