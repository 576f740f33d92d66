"""What must hold of a run whatever went wrong on its way: the laws of the fault tests, asked of registry and bucket."""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from botocore.exceptions import BotoCoreError, ClientError
from micro import MICRO
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from objects import stored

from tasks import tracking
from tasks.artifacts import Store, read_manifest
from tasks.artifacts.connection import FAMILIES, objects_below, uploads_below
from tasks.artifacts.manifest import MANIFEST_NAME
from tasks.settings import ServiceError

BUDGETS = tuple(budget["name"] for budget in MICRO["budgets"])
AWAY = (BotoCoreError, ClientError, MlflowException, OSError)
LAST_LOOK_SECONDS = 120.0  # until servers that were killed answer again


@dataclass(frozen=True)
class Outcome:
    """What a run made: digests of the files of its version, and its curves as (step, value), a repetition twice.

    The version itself is another in every registry.
    """

    files: Mapping[str, str]
    curves: Mapping[str, list[tuple[int, float]]]

    @property
    def weights(self) -> dict[str, str]:
        return {path: digest for path, digest in self.files.items() if path.endswith(".safetensors")}


@dataclass(frozen=True)
class Place:
    """The registry and the bucket of a run, asked directly."""

    tracking_uri: str
    store: Store

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.tracking_uri, self.tracking_uri)

    def outcome(self, family: str) -> Outcome:
        """The family that is champion: every object read back, every curve with all its points."""
        found = {name: tracking.resolve(self.tracking_uri, f"{family}-{name}") for name in BUDGETS}
        (manifest_uri,) = {entry.tags[tracking.MANIFEST] for entry in found.values()}
        (run_id,) = {entry.run_id for entry in found.values()}
        manifest = read_manifest(self.store, manifest_uri)
        root = f"{FAMILIES}{family}/{manifest.version}"
        for file in manifest.files:
            body = self.store.client.get_object(Bucket=self.store.bucket, Key=f"{root}/{file.path}")["Body"].read()
            assert hashlib.sha256(body).hexdigest() == file.sha256, file.path
        run = self.client.get_run(run_id)
        assert run.info.status == "FINISHED"
        curves = {key: self.client.get_metric_history(run_id, key) for key in run.data.metrics}
        return Outcome(
            files={file.path: file.sha256 for file in manifest.files},
            curves={key: sorted((point.step, point.value) for point in points) for key, points in curves.items()},
        )

    def unreferenced(self) -> list[str]:
        """Objects and begun uploads below families/ that belong to no version of the registry."""
        live = {uri.split("/", 3)[3].removesuffix(MANIFEST_NAME) for uri in tracking.pointed_to(self.tracking_uri)}
        objects = [entry["Key"] for entry in objects_below(self.store, FAMILIES)]
        uploads = [f"upload to {upload['Key']}" for upload in uploads_below(self.store, "")]
        return [key for key in objects if not any(key.startswith(prefix) for prefix in live)] + uploads


@dataclass
class Watch:
    """What a reader saw while faults happened: how often it looked, errors that it was told, what was not whole."""

    looks: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    partial: list[str] = field(default_factory=list)


@contextmanager
def watching(place: Place) -> Iterator[Watch]:
    """Look at registry and bucket all the while; whatever a reader can see there is whole.

    An error means that a server is away, as long as it passes once the faults are over.
    """
    watch, ended = Watch(), threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            try:
                watch.partial += partial_versions(place)
                watch.looks += 1
            except AWAY as error:
                watch.errors[str(error)] += 1
            except ServiceError as error:
                if not error.transient:
                    watch.partial.append(str(error))
                watch.errors[str(error)] += 1

    thread = threading.Thread(target=look, name="watch")
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()
    watch.partial += last_look(place)
    assert watch.looks and not watch.partial, watch


def last_look(place: Place) -> list[str]:
    """What is not whole once the servers answer again; the error of one that goes on to refuse."""
    end = time.monotonic() + LAST_LOOK_SECONDS
    while True:
        try:
            return partial_versions(place)
        except (*AWAY, ServiceError) as error:
            if (isinstance(error, ServiceError) and not error.transient) or time.monotonic() > end:
                raise
            time.sleep(0.5)


def partial_versions(place: Place) -> list[str]:
    """Manifests and registered versions that name files which are not there; aliases to a family that lacks a size."""
    client, listed = place.client, []
    aliased = [model for model in client.search_registered_models() if model.aliases]
    entries = list(client.search_model_versions(max_results=1000))
    published = {key for key in stored(place.store) if key.endswith(MANIFEST_NAME)}
    named = {entry.tags[tracking.MANIFEST] for entry in entries} | {
        f"s3://{place.store.bucket}/{key}" for key in published
    }
    for uri in named:
        manifest = read_manifest(place.store, uri)
        there, root = stored(place.store), f"{FAMILIES}{manifest.family}/{manifest.version}"
        listed += [f"{uri}: {file.path}" for file in manifest.files if there.get(f"{root}/{file.path}") != file.size]
    sizes = Counter(entry.tags[tracking.REGISTRATION] for entry in entries)
    versions = {(entry.name, str(entry.version)): entry.tags[tracking.REGISTRATION] for entry in entries}
    for model in aliased:
        for alias, number in model.aliases.items():
            if sizes[versions[model.name, str(number)]] < len(BUDGETS):
                listed.append(f"{model.name}@{alias}: a family that lacks a size")
    return listed
