"""The six benchmarks, judged at real engines and by lm-eval: the answers and verdicts of our own decoder, item by item.

lm-eval and `transformers serve` are in vLLM's environment.
"""

import json
import multiprocessing
import random
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import sixfold
import yaml
from endpoint import eventually

from elastic_core.judging import Endpoint
from tasks import judge
from tasks.judging.benchmarks import read_benchmark
from tasks.judging.mathematics import Mathematician
from tasks.judging.problems import Choice, Expression
from tasks.judging.sandbox import Sandbox
from tasks.judging.scorers import Verdict, judged
from tasks.records import Score
from tasks.running.digests import artifact
from tasks.running.engines import ENVIRONMENT, Engine, Program

pytestmark = [pytest.mark.services, pytest.mark.slow]

SECONDS = 600  # what hangs should end
KILLS = 10
ON_A_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
OPTIONS = {
    "vllm": ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
    "transformers": ("--dtype", "float32"),
}
BOXED = r"\\boxed\{([^{}]*)\}"

# The text of each problem's completion, by the benchmark and the problem.
Answers = dict[tuple[str, str], str]


def answers(home: Path, model: Path) -> Answers:
    """What the model has answered under this state directory."""
    found: Answers = {}
    for file in sorted((home / judge.SAMPLES).glob(f"*-{artifact(model).digest[:32]}.jsonl")):
        benchmark = file.name.removesuffix(f"-{artifact(model).digest[:32]}.jsonl")
        for sample in map(json.loads, file.read_text().splitlines()):
            assert (benchmark, sample["problem"]) not in found, "a sample was made twice"
            found[benchmark, sample["problem"]] = sample["completion"]["text"]
    return found


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> sixfold.Taught:
    return sixfold.teach(tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def ours(taught: sixfold.Taught, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Score], Answers]]:
    """By the model: its scores and answers by our own decoder."""
    home = tmp_path_factory.mktemp("ours")
    return {
        name: (sixfold.judge_all(home, name, model, taught.benchmarks, None), answers(home, model))
        for name, model in taught.models.items()
    }


@pytest.fixture(scope="module")
def served(
    taught: sixfold.Taught,
    engines: Path,
    vllm_program: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Mapping[str, Endpoint]]:
    """Each model behind an engine of its own, of the kind that a test asks for."""
    kind, logs = request.param, tmp_path_factory.mktemp("logs")
    path = vllm_program if kind == "vllm" else engines / "vllm/bin/transformers"
    program = Program(kind=kind, path=path, options=OPTIONS[kind])
    with ExitStack() as stack:
        started = {}
        for name, model in taught.models.items():
            bounded = program.cache_options(64 << 20)
            engine = Engine(program, model, name, log=logs / f"{name}.log", options=bounded, environment=ON_A_CPU)
            stack.callback(engine.stop)
            engine.start()
            started[name] = engine
        deadline = time.monotonic() + SECONDS
        while not all(engine.answers() for engine in started.values()):
            for engine in started.values():
                assert engine.process.running() and time.monotonic() < deadline, engine.last_words()
            time.sleep(0.5)
        together = 8 if program.answers_together else 1
        named = "{size}" if kind == "vllm" else "{path}"
        yield {
            name: Endpoint(url=f"{engine.url}/v1", model=named, concurrency=together, seconds=SECONDS)
            for name, engine in started.items()
        }


def test_the_family_answers_in_every_form_and_is_right_and_wrong(
    ours: dict[str, tuple[list[Score], Answers]], taught: sixfold.Taught
) -> None:
    """Else the tests below would compare less than they say."""
    for scores, said in ours.values():
        assert len(said) == len(taught.benchmarks) * sixfold.EACH
        assert all(score.accuracy > 0 and score.problems == sixfold.EACH for score in scores)
        assert len(set(said.values())) > 20
    assert min(score.accuracy for scores, _ in ours.values() for score in scores) < 1


@pytest.mark.parametrize("served", ["vllm", "transformers"], indirect=True)
def test_six_benchmarks_at_an_engine_have_our_own_decoders_answers_and_scores(
    served: Mapping[str, Endpoint],
    ours: dict[str, tuple[list[Score], Answers]],
    taught: sixfold.Taught,
    tmp_path: Path,
) -> None:
    for name, model in taught.models.items():
        scores = sixfold.judge_all(tmp_path, name, model, taught.benchmarks, served[name])
        assert answers(tmp_path, model) == ours[name][1]
        assert scores == ours[name][0]


@pytest.mark.parametrize("served", ["transformers"], indirect=True)
def test_judging_at_an_engine_that_is_killed_ten_times_loses_no_sample_and_makes_none_twice(
    served: Mapping[str, Endpoint],
    ours: dict[str, tuple[list[Score], Answers]],
    taught: sixfold.Taught,
    tmp_path: Path,
) -> None:
    model, chance = taught.models["s"], random.Random(7)
    asked = tuple(each for each in taught.benchmarks if each.form != "math")  # its scorer takes longer to start
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks.judge"])
    before: list[str] = []
    for kill in range(KILLS + 1):
        process = context.Process(target=sixfold.judge_all, args=(tmp_path, "s", model, asked, served["s"]))
        process.start()
        if kill < KILLS:
            eventually(partial(went_on, process, tmp_path, len(before)))
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
        process.join()
        kept = lines(tmp_path)
        assert set(before) <= set(kept)
        before = kept
    assert process.exitcode == 0
    wanted = {key: text for key, text in ours["s"][1].items() if key[0] in {each.name for each in asked}}
    assert answers(tmp_path, model) == wanted


def test_lm_eval_gives_each_item_our_answer_and_our_verdict(
    engines: Path, ours: dict[str, tuple[list[Score], Answers]], taught: sixfold.Taught, tmp_path: Path
) -> None:
    """On all problems whose answer is boxed; lm-eval runs no programs."""
    said = ours["s"][1]
    rows, verdicts, texts = [], [], []
    with Mathematician() as mathematician:
        for benchmark in taught.benchmarks:
            for problem in read_benchmark(benchmark):
                match problem.key:
                    case Expression(right) | Choice(right):
                        text = said[benchmark.name, problem.id]
                        rows.append({"prompt": problem.prompt, "answer": right})
                        texts.append(text)
                        verdicts.append(judged(text, problem.key, mathematician, Sandbox()))
    found = lm_eval(engines / "vllm/bin/python", taught.models["s"], rows, tmp_path)
    assert [each["resps"][0][0] for each in found] == texts
    assert [Verdict(each["filtered_resps"][0], bool(each["exact_match"])) for each in found] == verdicts
    assert {verdict.right for verdict in verdicts} == {True, False}


def lm_eval(python: Path, model: Path, rows: list[dict[str, str]], directory: Path) -> list[dict[str, Any]]:
    """What lm-eval logs of each row, in the order of the rows: greedy completions of chats, the last box compared."""
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last_box = {"function": "regex", "regex_pattern": BOXED, "group_select": -1}
    task = {
        "task": "boxed",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": sixfold.GREEDY.max_new_tokens},
        "filter_list": [{"name": "boxed", "filter": [last_box, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "boxed.yaml").write_text(yaml.safe_dump(task))
    command = [python, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--tasks", "boxed", "--include_path", directory]
    command += ["--apply_chat_template", "--log_samples", "--output_path", directory / "out"]
    caches = {
        "HOME": str(directory),
        "HF_HOME": str(directory / "hub"),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=caches | ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-5000:]
    (file,) = (directory / "out").rglob("samples_boxed_*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: int(sample["doc_id"]))


def went_on(process: BaseProcess, home: Path, samples: int) -> bool:
    """Whether a process has made another sample, or all of them."""
    assert process.is_alive() or process.exitcode == 0
    return not process.is_alive() or len(lines(home)) > samples


def lines(home: Path) -> list[str]:
    """The samples that are whole."""
    files = (home / judge.SAMPLES).glob("*.jsonl")
    return [line for file in files for line in file.read_text().split("\n")[:-1]]
