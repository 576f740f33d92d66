"""Judge a model on a benchmark: the problems brought here, then one step for each model that answers them.

What a model has answered stays in the state directory, under `samples`, a line a sample: a step that was killed goes on
from there, and so does one whose key has changed because of more runs or other scorers. Where the engine is another, by
its code, libraries, version or device, the model answers anew.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from elastic_core.budget import Dtype
from elastic_core.files.directories import staged_directory
from elastic_core.files.token_stream import TokenStream
from elastic_core.judging import PROBLEM, Benchmark, Endpoint, Engine, Evaluation, Reference, Sampling
from tasks.corpus.problems import beside_thoughts
from tasks.corpus.record import TRAIN_FILE
from tasks.corpus.sources import source_identity, teacher_identity
from tasks.corpus.tokenizer import load_tokenizer
from tasks.judging.benchmarks import PROBLEMS_FILE, asked_from, read_benchmark, write_problems
from tasks.judging.contamination import found_in_stream, runs_of
from tasks.judging.decoder import Decoder
from tasks.judging.endpoint import Client, Served
from tasks.judging.exact import recorded_problems
from tasks.judging.judge import Answering, judge
from tasks.judging.scores import score
from tasks.judging.started import Started, check_gpus, program_for
from tasks.records import Artifact, BenchmarkScore, Contamination, Score
from tasks.running.code import code_of, runs
from tasks.running.digests import artifact
from tasks.running.engines import Program
from tasks.running.limits import cores
from tasks.running.patience import patiently
from tasks.running.places import device, elsewhere
from tasks.running.progress import progress_bar
from tasks.running.steps import fingerprint, new_directory, run, step
from tasks.settings import home_directory
from tasks.teacher import fetch_teacher

SAMPLES, LOGS = "samples", "logs"
SHOWN = 5  # problems that stand in the corpus, by name
HELDOUT = "evaluation.problems"  # the name of the held-out problems, beside the benchmarks

logger = logging.getLogger(__name__)


def bring_benchmarks(settings: Evaluation, workspace: str) -> dict[str, Artifact]:
    """The problems of each benchmark, by its name."""

    def brought(benchmark: Benchmark) -> Artifact:
        identity = patiently(f"benchmark {benchmark.name}", partial(source_identity, benchmark.source))
        rows = replace(benchmark, runs=1, sampling=Sampling(), prompt=None)  # they are the same however they are asked
        return run(bring_problems, benchmark=rows, identity=identity, workspace=workspace)

    return {benchmark.name: brought(benchmark) for benchmark in settings.benchmarks}


def judge_models(
    models: Mapping[str, Artifact], problems: Mapping[str, Artifact], settings: Evaluation, dtype: Dtype
) -> tuple[BenchmarkScore, ...]:
    """The score of each model, by its name, on each benchmark."""
    return tuple(
        judge_model(name, model, problems[benchmark.name], benchmark, settings, dtype)
        for name, model in models.items()
        for benchmark in settings.benchmarks
    )


def judge_model(
    name: str, model: Artifact, problems: Artifact, benchmark: Benchmark, settings: Evaluation, dtype: Dtype
) -> BenchmarkScore:
    """The score of one model on one benchmark, by whichever engine the recipe has answer."""
    asked = replace(benchmark, path=PROBLEMS_FILE, format=benchmark.form)
    if settings.engine is not None:
        program = program_for(settings.engine, dtype)
        answered, engine = program.name, started_as(program.told)
        measured = run(
            judge_started,
            model=model,
            problems=problems,
            benchmark=asked,
            engine=settings.engine,
            told=program.told,
            dtype=dtype,
            unsafe_code=settings.unsafe_code,
        )
    elif settings.endpoint is not None:
        answered, engine = "endpoint", served_as(settings.endpoint)
        measured = run(
            judge_at,
            model=model,
            problems=problems,
            benchmark=asked,
            endpoint=settings.endpoint,
            size=name,
            unsafe_code=settings.unsafe_code,
        )
    else:
        answered, engine = "own decoder", decoded(dtype)
        measured = run(
            judge_here, model=model, problems=problems, benchmark=asked, dtype=dtype, unsafe_code=settings.unsafe_code
        )
    alike = (problems, asked.form, asked.prompt, asked.sampling, engine, code_of(score).modules)
    return BenchmarkScore(
        model=name,
        benchmark=benchmark.name,
        accuracy=measured.accuracy,
        score=measured,
        protocol=fingerprint(*alike),
        engine=answered,
    )


def find_engine(settings: Evaluation, dtype: Dtype) -> str:
    """The engine that the recipe has answer, and where, in words; "" where another answers.

    ValueError where it is missing here, or on a machine that steps for a GPU run on, or that has too few GPUs for it.
    """
    if settings.engine is None or not settings.benchmarks:
        return ""
    program = program_for(settings.engine, dtype)
    if elsewhere() is None:
        check_gpus(settings.engine)
    else:
        run(look_for_engine, engine=settings.engine, told=program.told, dtype=dtype)
    return f"{program.name}, {program.path}"


def same_program(engine: Engine, told: str, dtype: Dtype) -> Program:
    """The program of this machine; ValueError where it is not what the run that asks was told, or GPUs are too few."""
    check_gpus(engine)
    program = program_for(engine, dtype)
    if program.told != told:
        raise ValueError(f"this machine has {program.told}, and the run asks for {told}; install the same in both")
    return program


def decoded(dtype: Dtype) -> str:
    """What our own decoder's answers depend on beside the model and what it is asked."""
    return f"decoded in {dtype} on {device()} by {fingerprint(runs(Decoder))[:16]}"


def started_as(told: str) -> str:
    """What the answers of an engine that is started for them depend on beside the model and what it is asked."""
    return f"started {told} on {device()} for {fingerprint(code_of(Client).modules)[:16]}"


def served_as(endpoint: Endpoint) -> str:
    """What a server's answers depend on beside the model and what it is asked, as far as it can be told from here.

    The libraries that carry an answer do not make it: they are left out.
    """
    return f"served as {endpoint.model} to {fingerprint(code_of(Served).modules)[:16]}"


def bring_references(references: tuple[Reference, ...], workspace: str) -> dict[str, Artifact]:
    """The checkpoint of each reference that is judged, by its name."""
    paths = {reference.name: reference.path for reference in references if reference.path}
    return {
        name: run(
            fetch_teacher,
            path=path,
            identity=patiently(f"reference {name}", partial(teacher_identity, path)),
            workspace=workspace,
        )
        for name, path in paths.items()
    }


def published_scores(references: tuple[Reference, ...]) -> tuple[BenchmarkScore, ...]:
    """The scores of references as they were published."""
    return tuple(
        BenchmarkScore(model=reference.name, benchmark=name, accuracy=percent / 100, source=reference.source or "")
        for reference in references
        for name, percent in reference.published.items()
    )


@step("bring {benchmark.name}")
def bring_problems(benchmark: Benchmark, identity: str, workspace: str) -> Artifact:
    """The rows that a benchmark asks, from files, `s3://` or the Hub, every one of them read and found fit."""
    directory = new_directory(workspace, f"problems-{benchmark.name}")
    with staged_directory(directory) as staging:
        count = write_problems(benchmark, staging)
    logger.info("benchmark %s: %d problems", benchmark.name, count)
    return artifact(directory)


def look_for_contamination(
    settings: Evaluation,
    problems: Mapping[str, Artifact],
    problems_digest: str | None,
    corpus: Artifact,
    tokenizer: Artifact,
) -> tuple[Contamination, ...]:
    """How much of each benchmark and of the held-out problems stands in the training corpus, which is read once."""
    if not settings.benchmarks and settings.problems is None:
        return ()
    asked = {
        each.name: replace(each, path=PROBLEMS_FILE, format=each.form, prompt=PROBLEM) for each in settings.benchmarks
    }
    texts = {name: replace(each, runs=1, sampling=Sampling()) for name, each in asked.items()}
    found = run(
        find_contamination,
        benchmarks=texts,
        problems=dict(problems),
        heldout=Evaluation(problems=settings.problems, max_problems=settings.max_problems),
        problems_digest=problems_digest,
        corpus=corpus,
        tokenizer=tokenizer,
    )
    for each in found:
        if each.found:
            said = f"{each.found} of {each.problems} problems of {each.benchmark} stand in the training data"
            logger.warning("%s: %s", said, ", ".join(each.first) + (" ..." if each.found > len(each.first) else ""))
    return tuple(found)  # a list, where it comes from the cache


@step()
def find_contamination(
    benchmarks: dict[str, Benchmark],
    problems: dict[str, Artifact],
    heldout: Evaluation,
    problems_digest: str | None,
    corpus: Artifact,
    tokenizer: Artifact,
) -> tuple[Contamination, ...]:
    """Which problems have a run of tokens in the part of the corpus that is trained on.

    `benchmarks` ask theirs bare. Of the problems of `heldout` what the user says last is looked for: what a system says
    before is much the same in all chats.
    """
    read = load_tokenizer(Path(tokenizer.path))
    texts = {
        (name, problem.id): problem.prompt
        for name, benchmark in benchmarks.items()
        for problem in read_benchmark(asked_from(problems[name], benchmark))
    }
    for problem in recorded_problems(heldout, problems_digest):
        texts[HELDOUT, problem.where] = problem.question.last_of("user")
    tokens = {name: read(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
    with progress_bar("looking for the problems in the corpus") as report:
        found = found_in_stream(tokens, TokenStream(Path(corpus.path) / TRAIN_FILE), cores(), report)

    def counted(name: str) -> Contamination:
        own = [(problem, ids) for (kind, problem), ids in tokens.items() if kind == name]
        here = [problem for problem, _ in own if (name, problem) in found]
        short = sum(not runs_of(ids) for _, ids in own)
        return Contamination(benchmark=name, problems=len(own), found=len(here), short=short, first=tuple(here[:SHOWN]))

    return tuple(map(counted, dict.fromkeys(kind for kind, _ in tokens)))


@step("look for {told}", on_gpu=True)
def look_for_engine(engine: Engine, told: str, dtype: Dtype) -> str:
    """The path of the engine on a machine that judges."""
    return str(same_program(engine, told, dtype).path)


@step("judge {model.name} on {benchmark.name}", on_gpu=True)
def judge_here(model: Artifact, problems: Artifact, benchmark: Benchmark, dtype: Dtype, unsafe_code: bool) -> Score:
    """The score of a stock checkpoint that our own decoder answers with."""
    engine = Decoder(Path(model.path), dtype, f"{model.digest} {decoded(dtype)}")
    return _judged(model, problems, benchmark, engine, unsafe_code)


@step("judge {model.name} on {benchmark.name}", on_gpu=True)
def judge_started(
    model: Artifact,
    problems: Artifact,
    benchmark: Benchmark,
    engine: Engine,
    told: str,
    dtype: Dtype,
    unsafe_code: bool,
) -> Score:
    """The score of a stock checkpoint that an engine answers with, started here; `told` is its name and options."""
    program = same_program(engine, told, dtype)
    log = home_directory() / LOGS / f"judge-{model.name}-{model.digest[:8]}"
    identity = f"{model.digest} {started_as(told)}"
    answering = Started(program, engine, Path(model.path), model.name, log, identity, _special(model))
    return _judged(model, problems, benchmark, answering, unsafe_code)


@step("judge {model.name} on {benchmark.name}")
def judge_at(
    model: Artifact, problems: Artifact, benchmark: Benchmark, endpoint: Endpoint, size: str, unsafe_code: bool
) -> Score:
    """The score of a stock checkpoint that a server answers with."""
    if endpoint.doubt:
        logger.warning("%s on %s: %s", size, benchmark.name, endpoint.doubt)
    identity = f"{model.digest} {served_as(endpoint)}"
    engine = Served(endpoint, size, model.path, model.digest, identity, _special(model))
    return _judged(model, problems, benchmark, engine, unsafe_code)


def _special(model: Artifact) -> tuple[str, ...]:
    return beside_thoughts(load_tokenizer(Path(model.path)))


def _judged(model: Artifact, problems: Artifact, benchmark: Benchmark, engine: Answering, unsafe_code: bool) -> Score:
    samples = home_directory() / SAMPLES / f"{benchmark.name}-{model.digest[:32]}.jsonl"
    with progress_bar(f"judging on {benchmark.name}") as report:
        return judge(asked_from(problems, benchmark), engine, samples, unsafe_code=unsafe_code, report=report)
