"""The corpus: documents in, one stream of tokens to train on and one held out."""

from pathlib import Path

from elastic_core.recipe import DataConfig
from tasks.corpus import build as data
from tasks.corpus.sources import fetch_data
from tasks.records import Artifact
from tasks.running.bars import counter
from tasks.running.digests import artifact
from tasks.running.steps import new_directory, step


@step()
def prepare_data(config: DataConfig, identity: tuple[str, ...], tokenizer: Artifact, workspace: str) -> Artifact:
    """Tokenise the recipe's sources; `identity` tells one state of them from another."""
    directory = new_directory(workspace, "corpus")
    with counter("tokenising", "tokens") as count:
        data.build_corpus(
            config, Path(tokenizer.path), directory, fetch=fetch_data, progress=lambda _, tokens: count(tokens)
        )
    return artifact(directory)
