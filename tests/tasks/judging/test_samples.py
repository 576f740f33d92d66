"""Laws of samples: none that was finished is lost, none is made twice; and of the scores that they amount to."""

import json
import math
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filling import PROBLEMS, fill_slowly, wanted

from elastic_core.files.locks import IsHeld
from elastic_core.judging import Sampling
from tasks.judging.mathematics import Mathematician
from tasks.judging.problems import Case, Cases, Choice, Expression, Problem, Text
from tasks.judging.samples import Completion, Request, Sample, Wanted, fill, open_samples, requests
from tasks.judging.sandbox import Limits, Sandbox, why_not_isolated
from tasks.judging.scores import pass_at_1, score


@pytest.fixture(scope="module")
def mathematician() -> Iterator[Mathematician]:
    pytest.importorskip("math_verify", reason="math-verify comes with the extra `eval`")
    with Mathematician() as one:
        yield one


def right(request: Request) -> Completion:
    return Completion(text=f"<think>hm</think>{request.prompt[:-1]}", tokens=5, finish="stop")


def sample(request: Request, text: str = "a") -> Sample:
    return Sample(
        request=request.digest(), problem="p", run=0, completion=Completion(text=text, tokens=1, finish="stop")
    )


def test_a_killed_run_loses_no_sample_and_makes_none_twice(tmp_path: Path) -> None:
    path, begun = tmp_path / "samples.jsonl", tmp_path / "begun"
    chance = random.Random(7)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks.judging.samples"])
    finished_before: set[str] = set()
    for kill in range(11):
        begun.write_text("")
        process = context.Process(target=fill_slowly, args=(path, begun))
        process.start()
        if kill < 10:
            while not begun.read_text() and process.is_alive():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
            process.kill()
        process.join()
        assert not finished_before & set(begun.read_text().split())  # what is there is not asked again
        with open_samples(path) as samples:
            finished = {request.digest() for _, _, request in wanted() if request.digest() in samples}
        assert finished_before <= finished
        finished_before = finished
    assert process.exitcode == 0
    lines = [json.loads(line)["request"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert sorted(lines) == sorted(request.digest() for _, _, request in wanted())


def test_a_line_that_a_kill_cut_off_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "samples.jsonl"
    with open_samples(path) as samples:
        fill(samples, wanted(1), right, 3)
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        with open_samples(path) as samples:
            assert len(samples) == 59
            assert fill(samples, wanted(1), right, 3) == 1
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert "its last line was cut off; that sample is made again" in caplog.text


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with open_samples(path) as samples:
        fill(samples, wanted(1), right, 3)
    lines = path.read_text().splitlines()
    for damaged in (lines[1][5:], "{}", json.dumps(json.loads(lines[1]) | {"run": "one"})):
        path.write_text("\n".join([lines[0], damaged, *lines[2:], ""]))
        with (
            pytest.raises(ValueError, match=r"samples\.jsonl line 2 is no sample \(.*remove the line"),
            open_samples(path),
        ):
            pass


def test_only_one_process_fills_a_file(tmp_path: Path) -> None:
    with open_samples(tmp_path / "s"), pytest.raises(IsHeld), open_samples(tmp_path / "s"):
        pass


def test_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    texts = ["", "line\nline\r\n", "\u2028\u2029\x85", "\x00", "\ud83d", "𝔘 ünïcode", '"\\']
    asked = [Request(model="m", problem="i", prompt=text, sampling=Sampling(), seed=1) for text in texts]
    with open_samples(tmp_path / "s") as samples:
        for request in asked:
            samples.add(sample(request, request.prompt))
    with open_samples(tmp_path / "s") as samples:
        assert [samples[request.digest()].completion.text for request in asked] == texts


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Request(model="m", problem="i", prompt=prompt, sampling=Sampling(), seed=1) for prompt in "ab")
    write = os.write
    with open_samples(tmp_path / "s") as samples:
        monkeypatch.setattr(os, "write", lambda to, data: write(to, data[:20]))
        with pytest.raises(OSError, match="No space left"):
            samples.add(sample(first))
        monkeypatch.undo()
        assert first.digest() not in samples
        samples.add(sample(second))
    with open_samples(tmp_path / "s") as samples:
        assert len(samples) == 1
        assert second.digest() in samples


def test_a_sample_is_another_when_anything_that_is_asked_is() -> None:
    one = Request(model="m", problem="i", prompt="p", sampling=Sampling(), seed=1)
    others = [
        Request(model="n", problem="i", prompt="p", sampling=Sampling(), seed=1),
        Request(model="m", problem="j", prompt="p", sampling=Sampling(), seed=1),
        Request(model="m", problem="i", prompt="q", sampling=Sampling(), seed=1),
        Request(model="m", problem="i", prompt="p", sampling=Sampling(temperature=0.7), seed=1),
        Request(model="m", problem="i", prompt="p", sampling=Sampling(), seed=2),
    ]
    assert one.digest() not in {other.digest() for other in others}
    assert one.digest() == Request(model="m", problem="i", prompt="p", sampling=Sampling(), seed=1).digest()


def test_more_runs_and_more_problems_keep_what_is_there(tmp_path: Path) -> None:
    few = requests(PROBLEMS[:5], 1, "m", Sampling())
    many = requests(PROBLEMS[:8], 3, "m", Sampling())
    assert len({request.digest() for _, _, request in many}) == 24
    with open_samples(tmp_path / "s") as samples:
        assert fill(samples, few, right, 2) == 5
        assert fill(samples, many, right, 2) == 19


def test_two_problems_in_the_same_words_are_both_asked(tmp_path: Path) -> None:
    twins = [Problem(id=which, prompt="1+1?", key=Text("2"), where="") for which in "ab"]
    with open_samples(tmp_path / "s") as samples:
        assert fill(samples, requests(twins, 2, "m", Sampling()), right, 2) == len(samples) == 4


def test_an_error_ends_the_run_and_what_is_under_way_is_kept(tmp_path: Path) -> None:
    asked: list[str] = []
    failed = threading.Event()

    def complete(request: Request) -> Completion:
        asked.append(request.prompt)
        if request.prompt == "3?":
            failed.set()
            raise RuntimeError("the engine is gone")
        if request.prompt == "4?":
            assert failed.wait(30)
        return right(request)

    with open_samples(tmp_path / "s") as samples:
        with pytest.raises(RuntimeError, match="the engine is gone"):
            fill(samples, wanted(1), complete, 2)
        assert len(samples) == len(asked) - 1 < 10


def test_no_more_are_under_way_than_asked_for_and_none_is_left_out(tmp_path: Path) -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def complete(request: Request) -> Completion:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.002)
        with lock:
            under_way -= 1
        return right(request)

    with open_samples(tmp_path / "s") as samples:
        assert fill(samples, wanted(), complete, 7) == len(samples) == 120
    assert 1 < most <= 7


# Scores


def test_the_errors_are_those_of_the_mean_over_problems_and_over_runs() -> None:
    chance = random.Random(3)
    shares = [chance.random() for _ in range(50)]
    draws = [pass_at_1([[chance.random() < p for _ in range(8)] for p in shares]) for _ in range(2000)]
    means = [mean for mean, _, _ in draws]
    centre = sum(means) / len(means)
    spread = math.sqrt(sum((mean - centre) ** 2 for mean in means) / len(means))
    over_runs = math.sqrt(sum(e**2 for _, _, e in draws if e is not None) / len(draws))
    assert over_runs == pytest.approx(spread, rel=0.05)  # 2000 draws tell a spread within 1.6 %
    assert pass_at_1([[True, False], [True, True]]) == (0.75, pytest.approx(0.25), pytest.approx(0.25))
    assert pass_at_1([[True], [False]]) == (0.5, pytest.approx(0.5), None)
    assert pass_at_1([[True, False]]) == (0.5, None, pytest.approx(0.5))


def test_a_score_counts_what_is_right_unanswered_and_cut(tmp_path: Path, mathematician: Mathematician) -> None:
    problems = [
        Problem(id="m", prompt="m", key=Expression("\\frac{1}{2}"), where=""),
        Problem(id="c", prompt="c", key=Choice("B", 4), where=""),
        Problem(id="t", prompt="t", key=Text("yes"), where=""),
        Problem(id="n", prompt="n", key=Expression("7"), where=""),
    ]
    texts = {
        "m": "so</think>It is \\boxed{0.5}",
        "c": "so</think>\\boxed{A}",
        "t": "so</think> yes\n",
        "n": "Surely \\boxed{7}, but",
    }

    def complete(request: Request) -> Completion:
        cut = request.prompt == "n"
        return Completion(text=texts[request.prompt], tokens=100 if cut else 20, finish="length" if cut else "stop")

    asked = requests(problems, 2, "m", Sampling())
    with open_samples(tmp_path / "s") as samples:
        with pytest.raises(ValueError, match="8 of 8 samples have not been made"):
            score(asked, samples, mathematician, Sandbox(), 2)
        fill(samples, asked, complete, 2)
        result = score(asked, samples, mathematician, Sandbox(), 2)
    assert (result.problems, result.runs, result.accuracy) == (4, 2, 0.5)
    assert (result.unanswered, result.cut, result.tokens) == (0.25, 0.25, 40.0)
    assert result.standard_error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert result.run_error == 0


def test_programs_are_scored_by_their_tests(tmp_path: Path, mathematician: Mathematician) -> None:
    if (fault := why_not_isolated()) is not None:
        pytest.skip(f"programs cannot be isolated here: {fault}")
    key = Cases((Case("2", "4"), Case("3", "6")))
    problem = Problem(id="double", prompt="Double it.", key=key, where="")
    asked: list[Wanted] = requests([problem], 4, "m", Sampling(thinking=False))
    programs = ["print(2 * int(input()))", "print(4)", "while True print()", "while True: pass"]
    seeds = {request.seed: program for (_, _, request), program in zip(asked, programs, strict=True)}

    def complete(request: Request) -> Completion:
        return Completion(text=f"Here:\n```python\n{seeds[request.seed]}\n```", tokens=9, finish="stop")

    with open_samples(tmp_path / "s") as samples:
        fill(samples, asked, complete, 3)
        found = score(asked, samples, mathematician, Sandbox(limits=Limits(cpu_seconds=2)), 2)
    assert (found.accuracy, found.slow) == (0.25, 0.25)
