"""What the steps hand to one another: small records of paths and digests, never tensors.

A record is a step's persisted result. The next step's cache key is made of its digests, so that equal content is
never computed twice and a path may move.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic_core.comparison import Cut
from tasks import artifacts, tracking
from tasks.settings import Settings

KEY = re.compile("-[0-9a-f]{8,}$")  # as a step's directory has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A directory that a step wrote or found: the SHA-256 of each file, by its name below it, and one over them all."""

    path: str
    digest: str
    files: dict[str, str]

    @property
    def name(self) -> str:
        """What it is: the name of its directory, or of the step's around it, without the key of the step."""
        last, around = Path(self.path).name, Path(self.path).parent.name
        return KEY.sub("", next((part for part in (last, around) if KEY.search(part)), last))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """The elastic checkpoint after a stage, and the metrics of its steps (JSON lines)."""

    family: Artifact
    metrics: str
    metrics_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEvaluation:
    """What was measured of one budget.

    Cross-entropies and KL to the teacher are in nats a token, on held-out data. `cut_cross_entropy` is that of the
    reordered teacher cut at the same subnet with no training, `random_cut_cross_entropy` that of the teacher in random
    order. `accuracy` is the share of held-out problems answered exactly, by kind of problem in `accuracy_by_task`;
    `cut_answers` is the share of answers that came to the limit of tokens. `tokens_per_second` is that of decoding;
    `memory_bytes` is weights plus the caches of the decoded batch. Of a model with experts `active_params` are the
    parameters that a token passes through.
    """

    budget: str
    params: int
    weight_bytes: int
    memory_bytes: int
    cross_entropy: float
    kl: float
    cut_cross_entropy: float
    random_cut_cross_entropy: float
    tokens_per_second: float
    accuracy: float | None = None
    accuracy_by_task: Mapping[str, float] = field(default_factory=dict)
    active_params: int | None = None
    cut_answers: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a held-out loss depends on beside the model; two losses are compared only where these are equal.

    `sequences` are those read, `tokens` those predicted in them, `settings` what else of the evaluation a loss depends
    on, `device` is cuda or cpu, and `code` the digest of the code that computes a loss.
    """

    heldout_sha256: str
    tokenizer_sha256: str
    sequences: int
    tokens: int
    settings: Mapping[str, Any]
    dtype: str
    device: str
    code: str

    @property
    def text(self) -> str:
        """The one spelling of them, for people and for the digest."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """pass@1 over some runs of some problems: the mean over problems of the share of runs that are right.

    `standard_error`: of that mean, were other problems of the kind drawn, s / sqrt(problems), where s is the standard
    deviation of the problems' shares; None for one problem. `run_error`: were the same problems answered again,
    sqrt(sum of p(1 - p) / (runs - 1)) / problems, where p is a problem's share; None for one run. `unanswered`: the
    share of completions without an answer; `cut`: of those that came to the limit of tokens; `slow`: of those whose
    program was stopped because of its time; `tokens`: their mean.
    """

    problems: int
    runs: int
    accuracy: float
    standard_error: float | None
    run_error: float | None
    unanswered: float
    cut: float
    slow: float
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkScore:
    """pass@1 of a model on a benchmark: measured here, or published by a `source`.

    `model` is a budget, `teacher` or a reference. `score` is what was measured, and `protocol` the digest of everything
    that it depends on beside the model: two scores are compared only where it is the same. `engine` is what answered:
    "own decoder", "endpoint", or an engine that was started, by its name and version.
    """

    model: str
    benchmark: str
    accuracy: float
    score: Score | None = None
    protocol: str = ""
    source: str = ""
    engine: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contamination:
    """How many of a benchmark's `problems` stand in the training corpus, `found`, and the names of the first of them.

    `short` ones have too few tokens for it to be told. Those of `evaluation.problems` count as a benchmark here.
    """

    benchmark: str
    problems: int
    found: int
    short: int
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """The teacher, and every budget from the largest to the smallest, under the same conditions.

    `scores` are those of benchmarks: the teacher's, each budget's from the largest on, and the references'.
    """

    conditions: Conditions
    teacher_params: int
    teacher_cross_entropy: float
    teacher_accuracy: float | None
    heldout_tokens: int
    problems: int
    budgets: tuple[BudgetEvaluation, ...]
    teacher_active_params: int | None = None
    scores: tuple[BenchmarkScore, ...] = ()
    contamination: tuple[Contamination, ...] = ()
    teacher_cut_answers: float | None = None

    def measured_scores(self, model: str) -> dict[str, BenchmarkScore]:
        """A model's scores by benchmark, without those that were published."""
        return {score.benchmark: score for score in self.scores if score.model == model and score.score is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderComparison:
    """What cutting each axis alone loses in the order of importance and in random ones, on `heldout_tokens` tokens."""

    heldout_tokens: int
    cuts: tuple[Cut, ...]

    @property
    def doubtful(self) -> tuple[Cut, ...]:
        """The cuts that lose no less in the order of importance than in a random order."""
        return tuple(cut for cut in self.cuts if not cut.beats_random)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A registered version of the family: where its objects and its registry entries are.

    The version is of the objects' content; a `registration` is of these objects with what was measured of them.
    """

    family: str
    version: str
    registration: str
    uri: str
    models: Mapping[str, str]
    run_id: str
    report: str

    @property
    def number(self) -> str:
        """Its number in the registry, such as v7; several where its sizes were not always registered together."""
        return "v" + "/".join(dict.fromkeys(model.rpartition(":")[2] for model in self.models.values()))

    def exists(self) -> bool:
        """Whether registry and store still hold it: a number may have gone to another registration, objects be lost."""
        settings = Settings.from_environment()
        if not tracking.are_registered(settings.registry, self.models.values(), self.registration):
            return False
        store = replace(artifacts.open_store(settings), bucket=artifacts.parse_uri(self.uri)[0])
        return artifacts.published(store, self.family, self.version) is not None
