"""Laws of contamination: a problem in the corpus is found wherever it stands, against the plain search; no other is."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from elastic_core.files.token_stream import TokenStream
from tasks.judging import contamination
from tasks.judging.contamination import DIFFERENT, N, found_in_stream, hashed, runs_of


def stream(directory: Path, tokens: list[int]) -> TokenStream:
    path = directory / "train.safetensors"
    save_file({"tokens": torch.tensor(tokens, dtype=torch.int32)}, path)
    return TokenStream(path)


def stands_in(problem: list[int], text: list[int]) -> bool:
    """Whether a run of the problem is in the text, by looking at each place."""
    runs = {tuple(text[i : i + N]) for i in range(len(text) - N + 1)}
    return any(
        tuple(problem[i : i + N]) in runs and len(set(problem[i : i + N])) >= DIFFERENT
        for i in range(len(problem) - N + 1)
    )


def test_the_problems_that_stand_in_a_corpus_are_those_of_the_plain_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of problems, of more than a run and of one token less, everywhere in a corpus that is read in pieces."""
    monkeypatch.setattr(contamination, "READ_AT_ONCE", 97)
    chance = random.Random(5)
    problems = {f"p{i}": chance.choices(range(50_000), k=chance.randint(N - 2, 60)) for i in range(60)}
    text = chance.choices(range(50_000), k=40)
    for problem in list(problems.values())[:40]:
        length = chance.choice([N - 1, N, N + 3])
        first = chance.randint(0, max(0, len(problem) - length))
        text += problem[first : first + length] + chance.choices(range(50_000), k=chance.randint(0, 60))
    expected = {name for name, problem in problems.items() if stands_in(problem, text)}
    assert 5 < len(expected) < 40
    assert found_in_stream(problems, stream(tmp_path, text), threads=2) == expected


def test_two_problems_that_share_a_run_are_both_found_and_one_of_zeros_or_too_short_is_not(tmp_path: Path) -> None:
    shared = list(range(100, 100 + N))
    problems = {"a": [1, *shared], "b": [*shared, 2], "zeros": [7] * 40, "short": shared[: N - 1], "none": []}
    found = found_in_stream(problems, stream(tmp_path, [7] * 60 + shared), threads=1)
    assert found == {"a", "b"} and not runs_of(problems["zeros"]) and not runs_of(problems["short"])
    assert found_in_stream({}, stream(tmp_path, shared), threads=1) == set()
    assert found_in_stream(problems, stream(tmp_path, shared[:3]), threads=1) == set()


def test_runs_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "hashed", lambda tokens: hashed(tokens) * np.uint64(0))
    problems = {"a": list(range(N)), "b": list(range(1, N + 1))}
    assert found_in_stream(problems, stream(tmp_path, list(range(N))), threads=1) == {"a"}
