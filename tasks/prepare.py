"""The corpus: documents in, one stream of tokens to train on and one held out."""

from pathlib import Path

from elastic_core.config import DataConfig
from tasks import data, documents
from tasks import tokenizer as tokenizer_module
from tasks.bars import counter
from tasks.records import Artifact
from tasks.sources import fetch_data
from tasks.steps import artifact, new_directory, step


@step(data, documents, tokenizer_module)
def prepare_data(config: DataConfig, identity: tuple[str, ...], tokenizer: Artifact, workspace: str) -> Artifact:
    """Tokenise the recipe's sources; `identity` tells one state of them from another."""
    directory = new_directory(workspace, "corpus")
    with counter("tokenising", "tokens") as count:
        data.prepare_data(
            config, Path(tokenizer.path), directory, fetch=fetch_data, progress=lambda _, tokens: count(tokens)
        )
    return artifact(directory)
