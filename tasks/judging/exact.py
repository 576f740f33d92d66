"""Held-out problems, answered greedily by a model and compared character by character."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from elastic_core.generate import complete, stop_tokens
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Evaluation
from elastic_core.subnet import full_subnet
from tasks.corpus import sources
from tasks.corpus.problems import Problem, encode_questions, read_problems, spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Match(NamedTuple):
    """Whether a problem was answered exactly, and whether the answer came to the limit of tokens."""

    right: bool
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Exact-match accuracy over all problems and by kind of problem, and the share of answers that were cut off."""

    problems: int
    accuracy: float
    by_task: Mapping[str, float]
    cut: float


def recorded_problems(settings: Evaluation, digest: str | None) -> list[Problem]:
    """The problems; ValueError where this host has others than those of the SHA-256 on record."""
    if settings.problems is None:
        return []
    if digest is not None and sources.problems_digest(settings.problems) != digest:
        raise ValueError(
            f"{settings.problems} is another file here than where the run began; have the same on all hosts"
        )
    return read_problems(Path(settings.problems), settings.max_problems)


def matches(
    model: ElasticNemotronH, tokenizer: "PreTrainedTokenizerFast", problems: Sequence[Problem], settings: Evaluation
) -> list[Match]:
    """What a model answers to each problem. What counts is what follows the last thought."""
    prompts = encode_questions(tokenizer, problems, settings.chat_template_kwargs)
    completions = complete(
        model,
        [prompt.ids for prompt in prompts],
        full_subnet(model.config),
        max_new_tokens=settings.max_new_tokens,
        stop_tokens=stop_tokens(model.config),
    )
    return [
        Match(
            right=prompt.answer(spoken(completion, tokenizer)) == problem.answer,
            cut=len(completion) == settings.max_new_tokens,
        )
        for problem, prompt, completion in zip(problems, prompts, completions, strict=True)
    ]


def tally(problems: Sequence[Problem], found: Sequence[Match]) -> Answers:
    """The share of the problems that were answered exactly, and of each kind, and of answers that were cut off."""
    asked, right = Counter(problem.task for problem in problems), Counter[str]()
    for problem, match in zip(problems, found, strict=True):
        right[problem.task] += match.right
    return Answers(
        problems=len(problems),
        accuracy=right.total() / len(problems),
        by_task={task: right[task] / asked[task] for task in sorted(asked)},
        cut=sum(match.cut for match in found) / len(problems),
    )
