"""The first documents of a source, as they would be trained on."""

from dataclasses import replace
from pathlib import Path

from elastic_core.recipe import DataSource
from tasks import artifacts
from tasks.corpus.documents import Tally, documents_in, iter_rows
from tasks.corpus.encoding import Encoder
from tasks.corpus.ends import end_tokens
from tasks.corpus.pieces import format_of
from tasks.corpus.tokenizer import load_tokenizer
from tasks.settings import Settings


def sample(source: DataSource, tokenizer_dir: Path, count: int, directory: Path) -> tuple[list[str], int, int]:
    """The texts of at most `count` documents, decoded from their tokens; how many tokens these are, and how many of
    them are learned.

    `directory` takes what has to be fetched: of a prefix in S3 the first file with documents. ValueError, one line with
    file, row and remedy, for a row that cannot be used.
    """
    source = replace(source, max_documents=min(count, source.max_documents or count))
    tokenizer, tally = load_tokenizer(tokenizer_dir), Tally(source)
    encoder = Encoder(tokenizer, end_tokens(tokenizer_dir))
    documents = documents_in(iter_rows(source, fetch=fetch_first, directory=directory), source, tally)
    samples = [each for _, found in encoder.samples(documents, source, tally) for each in found]
    texts = [str(tokenizer.decode(each.ids)) for each in samples]
    return texts, sum(len(each.ids) for each in samples), sum(each.count_learned for each in samples)


def fetch_first(uri: str, directory: Path) -> Path:
    """Download the first file with documents at an `s3://` object or prefix into `directory`."""
    store = artifacts.open_store(Settings.from_environment(need_bucket=False))
    names = [name for name, _ in artifacts.list_objects(store, uri)]
    name = next((name for name in names if format_of(Path(name)) is not None), names[0])
    whole = uri if uri.endswith(f"/{name}") else f"{uri.rstrip('/')}/{name}"
    directory.mkdir(parents=True)
    artifacts.get_file(store, whole, directory / Path(name).name)
    return directory
