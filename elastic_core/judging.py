"""How a family is judged, as a recipe spells it: loss, benchmarks and who answers them, references, and the gate."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from elastic_core.schema import UNKEYED, Strict, checked_name, not_negative, positive
from elastic_core.sources import DataSource, TemplateArgument

EngineKind = Literal["vllm", "transformers"]
Format = Literal["math", "choice", "gpqa", "livecodebench", "exact"]
PROBLEM = "{problem}"
SIZE, DIGEST, PATH = "{size}", "{digest}", "{path}"
DIGEST_LENGTH = 12  # characters that stand for {digest}
TEACHER = "teacher"  # the name of its row beside the sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """Where a benchmark lies on the Hub, how many problems it has, and how its rows are read.

    Without a path its files must be brought here.
    """

    path: str | None
    problems: int
    split: str
    format: Format
    since: str | None = None
    until: str | None = None


# The six of NVIDIA's reports. LiveCodeBench is there as a program, which `datasets` no longer runs.
BUILT_IN: Mapping[str, BuiltIn] = {
    "math-500": BuiltIn(path="hf://HuggingFaceH4/MATH-500", problems=500, split="test", format="math"),
    "aime-2024": BuiltIn(path="hf://HuggingFaceH4/aime_2024", problems=30, split="train", format="math"),
    "aime-2025": BuiltIn(path="hf://yentinglin/aime_2025", problems=30, split="train", format="math"),
    "gpqa-diamond": BuiltIn(path="hf://Idavidrein/gpqa/gpqa_diamond", problems=198, split="train", format="gpqa"),
    "mmlu-pro": BuiltIn(path="hf://TIGER-Lab/MMLU-Pro", problems=12_032, split="test", format="choice"),
    "livecodebench-v5": BuiltIn(
        path=None, problems=315, split="test", format="livecodebench", since="2024-07-01", until="2024-12-31"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling(Strict):
    """How completions are drawn. The defaults are those that NVIDIA judges Nemotron Nano v2 by."""

    temperature: float = 0.6
    """What the logits are divided by; 0 takes the most likely token. Example: `0.6`."""
    top_p: float = 0.95
    """The share of probability, from the most likely token on, that is drawn from. Example: `0.95`."""
    max_new_tokens: int = 32_768
    """Tokens in a completion at most, its thought included. Example: `32768`."""
    system: str | None = "/think"
    """The system message; unset, none. Example: `/no_think`."""
    thinking: bool = True
    """Whether the chat template, told so by the system message, has the completion begin inside a thought, so that one
    whose thought does not end has no answer. Our own decoder sees that for itself. Example: `false`."""

    def __post_init__(self) -> None:
        positive(self, "max_new_tokens")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} must be at least 0, top_p={self.top_p} above 0 and up to 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark(Strict):
    """Problems that a model answers several times each.

    `math-500`, `aime-2024`, `aime-2025`, `gpqa-diamond`, `mmlu-pro` and `livecodebench-v5` are built in: their name is
    enough, but for the last, whose files must be brought here.
    """

    name: str
    """What the benchmark is called, once in a recipe. Example: `aime-2025`."""
    path: str | None = None
    """A JSONL or Parquet file, a directory or a glob of such, here or as `s3://bucket/...`; or `hf://org/name`; unset,
    where the built-in benchmark lies on the Hub. Example: `aime_2025.jsonl`."""
    format: Format | None = None
    """How its rows are read and its answers judged: `math` (MATH-500, AIME), the boxed answer mathematically; `choice`
    (MMLU-Pro), the boxed letter; `gpqa`, the same, from GPQA's columns; `livecodebench`, a program by its tests;
    `exact`, the whole answer word for word. Unset, the built-in benchmark's. Example: `math`."""
    split: str = "test"
    """The split to take of a data set on the Hub that is not built in. Example: `train`."""
    runs: int = 8
    """Completions of each problem. Example: `4`."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are drawn."""
    prompt: str | None = None
    """What is asked, with `{problem}` where the problem stands; unset, the format's own words.
    Example: `"Solve this, and box the answer: {problem}"`."""
    max_problems: int | None = None
    """Problems to ask at most, the first ones; unset, all. Example: `100`."""
    since: str | None = None
    """With `livecodebench`, the first day of contest whose problems count. Example: `"2024-07-01"`."""
    until: str | None = None
    """With `livecodebench`, the last such day. Example: `"2024-12-31"`."""

    def __post_init__(self) -> None:
        checked_name("benchmark", self.name)
        positive(self, "runs")
        if self.max_problems is not None:
            positive(self, "max_problems")
        if self.prompt is not None and PROBLEM not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} has no {PROBLEM}, where the problem is to stand")
        built_in = BUILT_IN.get(self.name)
        if built_in is None and (self.path is None or self.format is None):
            known = ", ".join(BUILT_IN)
            raise ValueError(f"benchmark {self.name!r} needs path and format; those built in are {known}")
        if self.path == "" or (self.path is None and built_in is not None and built_in.path is None):
            raise ValueError(
                f"benchmark {self.name!r} needs path: bring its files here and name them, such as "
                "livecodebench/test*.jsonl"
            )
        if self.form != "livecodebench" and (self.since or self.until):
            raise ValueError("since and until are days of contests; only format livecodebench has them")

    @property
    def form(self) -> Format:
        """How its rows are read: as it says, or as the built-in benchmark's."""
        return self.format or BUILT_IN[self.name].format

    @property
    def source(self) -> DataSource:
        """Where its rows are."""
        built_in = BUILT_IN.get(self.name)
        if self.path is not None or built_in is None or built_in.path is None:
            assert self.path is not None, "checked on construction"
            return DataSource(path=self.path, split=self.split)
        return DataSource(path=built_in.path, split=built_in.split)

    @property
    def days(self) -> tuple[str, str]:
        """The first and the last day of contest whose problems count."""
        built_in = BUILT_IN.get(self.name)
        since = self.since or (built_in.since if built_in else None)
        until = self.until or (built_in.until if built_in else None)
        return since or "", until or "9999"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint(Strict):
    """A server of models that speaks OpenAI's chat protocol. Its key, if it wants one, is in OPENAI_API_KEY."""

    url: str = field(metadata=UNKEYED)
    """Where the server's paths begin. Example: `http://127.0.0.1:8000/v1`."""
    model: str
    """The model's name on the server, with `{size}` where a budget's name, `teacher` or a reference's name stands,
    `{digest}` where the first 12 digits of its files' digest do, or `{path}` where its directory does. Without
    `{digest}` or `{path}` the server may still have an earlier run's weights by that name: log and report warn of it,
    and `promotion.benchmarks` is refused. Example: `nano-{size}-{digest}`."""
    concurrency: int = field(default=64, metadata=UNKEYED)
    """Requests that are under way at once. Example: `256`."""
    seconds: float = field(default=7200.0, metadata=UNKEYED)
    """How long a completion may take before it is asked for again. Example: `600`."""

    def __post_init__(self) -> None:
        positive(self, "concurrency", "seconds")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError("url does not begin with http:// or https://; write http://host:port/v1")
        if "@" in self.url.split("/")[2]:
            raise ValueError("url holds a user's name or password; leave it out, and set OPENAI_API_KEY")

    @property
    def doubt(self) -> str:
        """Why a score may be of other weights than the run's; empty where other weights have another name."""
        if DIGEST in self.model or PATH in self.model:
            return ""
        remedy = f"put {DIGEST} or {PATH} in evaluation.endpoint.model"
        return f"the server may still have an earlier run's weights as {self.model!r}; {remedy}"

    def model_of(self, size: str, path: str, digest: str) -> str:
        """The name on the server of the model of a size, whose files are at a path and have a digest."""
        return self.model.replace(SIZE, size).replace(DIGEST, digest[:DIGEST_LENGTH]).replace(PATH, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine(Strict):
    """A server of one model, which the step that judges it starts where steps for a GPU run, and ends.

    It computes in the recipe's `dtype`. A score depends on its name, version and options: with others, problems are
    answered anew.
    """

    program: EngineKind | None = field(default=None, metadata=UNKEYED)
    """`vllm`, or `transformers` for `transformers serve`, which answers one request after another and is for small
    models; unset, vLLM where it is installed, else transformers. Example: `vllm`."""
    options: str = field(default="", metadata=UNKEYED)
    """Options of the program's own, as one writes them in a shell. Example: `"--max-model-len 40960"`."""
    gpus: int = field(default=1, metadata=UNKEYED)
    """GPUs of a replica, over which vLLM shares out each layer. There are as many replicas as the GPUs of the machine
    allow, and one on a CPU. Example: `2`."""
    concurrency: int = field(default=64, metadata=UNKEYED)
    """Requests that are under way at once in each replica; transformers has one. Example: `256`."""
    seconds: float = field(default=7200.0, metadata=UNKEYED)
    """How long a completion may take before it is asked for again. Example: `600`."""

    def __post_init__(self) -> None:
        positive(self, "gpus", "concurrency", "seconds")
        try:
            shlex.split(self.options)
        except ValueError as error:
            raise ValueError(f"options={self.options!r} is not what a shell can read: {error}") from None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The options one by one."""
        return tuple(shlex.split(self.options))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference(Strict):
    """A model beside the family in the table of benchmarks: with scores that were published, or judged like a size."""

    name: str
    """What the model is called. Example: `Qwen3-8B`."""
    path: str | None = None
    """A Nemotron-H checkpoint to judge on every benchmark: a directory, `s3://bucket/prefix`, or `org/name` on the Hub;
    unset, only what was published is shown. Example: `nvidia/NVIDIA-Nemotron-Nano-9B-v2`."""
    published: dict[str, float] = field(default_factory=dict)
    """Its pass@1 in percent, by the benchmark's name. Example: `{math-500: 96.3, aime-2024: 75.8}`."""
    source: str | None = None
    """Where the scores were published. Example: `arXiv 2511.16664, table 1`."""

    def __post_init__(self) -> None:
        checked_name("reference", self.name)
        if not self.path and not self.published:
            raise ValueError(f"reference {self.name!r} has neither path nor published scores; give one")
        if self.published and not self.source:
            raise ValueError(f"reference {self.name!r} has published scores and no source; say where they stand")
        for name, score in self.published.items():
            if not 0 <= score <= 100:
                raise ValueError(f"reference {self.name!r}: {name}={score} is not a percentage, from 0 to 100")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Strict):
    """What is measured of every budget: its loss on held-out tokens, the problems it solves, and its benchmarks."""

    heldout_tokens: int = 1_000_000
    """Held-out tokens to measure on, at most; a run warns where not half as many are held out. Example: `10000000`."""
    sequence_length: int = 8192
    """Tokens in a held-out sequence. Example: `8192`."""
    batch_size: int = 1
    """Sequences run at once. Example: `4`."""
    problems: str | None = None
    """A JSONL file of problems, answered by greedy generation and scored by exact match; each is a chat whose last
    message is the answer. Example: `problems.jsonl`."""
    max_problems: int = 256
    """Problems to answer at most. Example: `150`."""
    max_new_tokens: int = 512
    """Tokens in an answer at most. Example: `512`."""
    chat_template_kwargs: dict[str, TemplateArgument] = field(default_factory=dict)
    """Arguments for the chat template of the problems, by name. Example: `{enable_thinking: false}`."""
    benchmarks: tuple[Benchmark, ...] = field(default=(), metadata=UNKEYED)
    """Benchmarks that the teacher and every size answer, each judged in a step of its own.
    Example: `[{name: math-500}, {name: sums, path: sums.jsonl, format: exact}]`."""
    endpoint: Endpoint | None = field(default=None, metadata=UNKEYED)
    """The server that answers the benchmarks. Without it and without `engine` our own decoder answers them, which is
    for small models."""
    engine: Engine | None = field(default=None, metadata=UNKEYED)
    """The engine that answers the benchmarks, started for each of them and each model, and ended after it.
    Example: `{program: vllm, options: "--max-model-len 40960"}`."""
    unsafe_code: bool = field(default=False, metadata=UNKEYED)
    """Whether programs that a model wrote may run without a sandbox, where this machine has none, as the user who runs
    the pipeline. Example: `true`."""

    def __post_init__(self) -> None:
        positive(self, "heldout_tokens", "sequence_length", "batch_size", "max_problems", "max_new_tokens")
        if self.problems == "":
            raise ValueError("problems is empty; name a file of problems, or leave it out")
        if self.endpoint is not None and self.engine is not None:
            raise ValueError("endpoint and engine are both given; leave out the one that is not to answer")
        names = [benchmark.name for benchmark in self.benchmarks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"benchmark {twice!r} is named twice; give each benchmark a name of its own")

    @property
    def is_decoded(self) -> bool:
        """Whether our own decoder answers the benchmarks."""
        return self.endpoint is None and self.engine is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion(Strict):
    """The gate to `champion`."""

    margin: float = 0.01
    """How far the held-out cross-entropy may lie above the present champion's, as a share of that. Example: `0.02`."""
    benchmarks: dict[str, float] = field(default_factory=dict)
    """How far pass@1 of each benchmark, by its name, may lie below the present champion's, in standard errors of the
    difference; a benchmark that is not named is not asked for. Example: `{math-500: 2}`."""

    def __post_init__(self) -> None:
        not_negative(self, "margin")
        if any(margin < 0 for margin in self.benchmarks.values()):
            raise ValueError(f"benchmarks={self.benchmarks} must give each benchmark a margin of at least 0")
