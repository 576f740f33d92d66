"""The corpus: documents in, one stream of tokens to train on and one held out."""

import shutil
from functools import partial
from pathlib import Path

from elastic_core.recipe import DataConfig
from tasks.corpus import build as data
from tasks.corpus.record import read_record
from tasks.corpus.sources import check_unchanged
from tasks.corpus.workers import PROCESS_BYTES
from tasks.records import Artifact
from tasks.running.digests import artifact, set_aside
from tasks.running.limits import cores, memory
from tasks.running.places import elsewhere
from tasks.running.progress import progress_bar
from tasks.running.ray_cluster import RayCluster
from tasks.running.ray_shards import are_everywhere, on_hosts, places_of
from tasks.running.steps import step, work_directory
from tasks.settings import ServiceError


@step()
def prepare_data(config: DataConfig, identity: tuple[str, ...], tokenizer: Artifact, workspace: str) -> Artifact:
    """Tokenise the recipe's sources, on as many cores as have memory; `identity` tells one state of them from another.

    What is on S3 or the Hub is read there, a shard at a time. Where a Ray cluster does the steps, and every host can
    read the sources, all hosts tokenise. A run that was killed begins again at the first shard that is not whole.
    """
    directory, shards = work_directory(workspace, "corpus"), work_directory(workspace, "shards")
    if not directory.exists():
        check_unchanged(config.sources, identity)
        processes, others = max(1, min(cores(), memory() // PROCESS_BYTES)), None
        cluster = elsewhere()
        if isinstance(cluster, RayCluster) and are_everywhere(config) and (places := places_of(cluster)):
            processes, others = places, partial(on_hosts, cluster, tokenizer)
        with progress_bar("tokenising", unit="tokens") as report:
            data.build_corpus(
                config,
                Path(tokenizer.path),
                directory,
                work=shards,
                processes=processes,
                others=others,
                progress=report,
            )
        try:
            check_unchanged(config.sources, identity)
        except ServiceError:  # shards of two states: none of them is of the recorded one
            shutil.rmtree(directory)
            shutil.rmtree(shards, ignore_errors=True)
            raise
    # Before the corpus is hashed: its files are links to those of the shards, and losing a link changes a file's times.
    shutil.rmtree(shards, ignore_errors=True)
    made, record = artifact(directory), read_record(directory)
    for name, written in [*record.train.files.items(), *record.heldout.files.items()]:
        if made.files.get(name) != written:
            set_aside(made)
            raise ServiceError(f"{directory / name} is not what was written to it; look at the disk", transient=True)
    return made
