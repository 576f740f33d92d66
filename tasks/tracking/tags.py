"""Tags of registered models and of their versions."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tasks.settings import redact
from tasks.tracking.connection import client_of, explained, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)


def tag_versions(uri: str, models: Collection[str], tags: Mapping[str, str]) -> None:
    """Set tags on registered versions, each NAME:VERSION."""
    with explained(uri, f"tagging {', '.join(models)}"):
        client = client_of(uri)
        for model in models:
            for key, value in tags.items():
                _tag(client, model, key, redact(value))


def model_tags(uri: str, name: str) -> dict[str, str]:
    """The tags of a registered model; none where there is no such model."""
    with explained(uri, f"looking up {name}"):
        return _tags(client_of(uri), name)


@contextmanager
def tags_set(uri: str, tags: Mapping[str, Mapping[str, str]]) -> Iterator[None]:
    """Set tags of models, by NAME, and of versions, by NAME:VERSION. Where one cannot be set, or the block fails,
    all get back the values that they had.
    """
    with explained(uri, f"tagging {', '.join(tags)}"):
        client = client_of(uri)
        before = {subject: _tags(client, subject) for subject in tags}
        try:
            for subject, values in tags.items():
                for key, value in values.items():
                    _tag(client, subject, key, redact(value))
            yield
        except BaseException:
            for subject, values in tags.items():
                _untag(client, subject, {key: before[subject].get(key) for key in values})
            raise


def _tags(client: "MlflowClient", subject: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    name, _, version = subject.partition(":")
    try:
        return dict((client.get_model_version(name, version) if version else client.get_registered_model(name)).tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _tag(client: "MlflowClient", subject: str, key: str, value: str) -> None:
    name, _, version = subject.partition(":")
    if version:
        client.set_model_version_tag(name, version, key, value)
    else:
        client.set_registered_model_tag(name, key, value)


def _untag(client: "MlflowClient", subject: str, before: Mapping[str, str | None]) -> None:
    """Give tags the values that they had, None for those that were not there."""
    from mlflow.exceptions import MlflowException

    name, _, version = subject.partition(":")
    for key, value in before.items():
        try:
            if value is not None:
                _tag(client, subject, key, value)
            elif version:
                client.delete_model_version_tag(name, version, key)
            else:
                client.delete_registered_model_tag(name, key)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                _log.warning("tag %s of %s could not be put back: %s", key, subject, first_line(error))
