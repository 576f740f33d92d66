"""The corpus: documents in, one stream of tokens to train on and one held out."""

import shutil
from pathlib import Path

from elastic_core.recipe import DataConfig
from tasks.corpus import build as data
from tasks.corpus.sources import fetch_data
from tasks.corpus.workers import cores
from tasks.records import Artifact
from tasks.running.digests import artifact
from tasks.running.progress import progress_bar
from tasks.running.steps import new_directory, step, work_directory
from tasks.settings import ServiceError


@step()
def prepare_data(config: DataConfig, identity: tuple[str, ...], tokenizer: Artifact, workspace: str) -> Artifact:
    """Tokenise the recipe's sources, on all cores; `identity` tells one state of them from another.

    A run that was killed begins again at the first shard that is not whole.
    """
    directory, work = new_directory(workspace, "corpus"), work_directory(workspace, "shards")
    with progress_bar("tokenising", unit="tokens") as report:
        record = data.build_corpus(
            config,
            Path(tokenizer.path),
            directory,
            fetch=fetch_data,
            work=work,
            processes=cores(),
            progress=report,
        )
    made = artifact(directory)
    shutil.rmtree(work)
    for name, written in [*record.train.files.items(), *record.heldout.files.items()]:
        if made.files[name] != written:
            raise ServiceError(f"{directory / name} is not what was written to it; look at the disk", transient=True)
    return made
