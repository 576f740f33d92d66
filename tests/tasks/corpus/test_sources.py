"""What is brought from S3 is called as it is there."""

from pathlib import Path

from elastic_core.recipe import DataSource
from tasks.artifacts import Store
from tasks.corpus.documents import source_files
from tasks.corpus.sources import fetch_data


def test_an_object_is_fetched_to_a_file_and_a_prefix_to_a_directory_and_both_are_called_as_in_s3(
    store: Store, tmp_path: Path
) -> None:
    for key in ("data/one.jsonl", "data/two.jsonl", "twice/x.jsonl", "twice/x.jsonl/x.jsonl"):
        store.client.put_object(Bucket=store.bucket, Key=key, Body=b'{"text": "it"}\n')
    bucket = f"s3://{store.bucket}"
    named = {
        f"{bucket}/data/one.jsonl": [f"{bucket}/data/one.jsonl"],
        f"{bucket}/data": [f"{bucket}/data/one.jsonl", f"{bucket}/data/two.jsonl"],
        f"{bucket}/twice/x.jsonl": [f"{bucket}/twice/x.jsonl/x.jsonl"],
    }
    for number, (uri, names) in enumerate(named.items()):
        files = source_files(DataSource(path=uri), fetch=fetch_data, directory=tmp_path / str(number))
        assert list(files) == names and all(file.is_file() for file in files.values())
