"""What answering benchmarks takes at most: every completion as long as it may be."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from elastic_core.judging import BUILT_IN, Benchmark
from elastic_core.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkPlan:
    """A benchmark, which each of so many `models` answers; `problems` is None where their number is not known.

    `weight_bytes` are those of all models together: to decode a token of each, they are read once. They are 0 where an
    endpoint answers, whose GPUs are not the run's.
    """

    name: str
    problems: int | None
    runs: int
    max_new_tokens: int
    models: int
    weight_bytes: int

    @property
    def tokens_of_a_model(self) -> int | None:
        """The most that a model writes: problems x runs x max_new_tokens."""
        return None if self.problems is None else self.problems * self.runs * self.max_new_tokens

    @property
    def tokens(self) -> int | None:
        """The most that all models write."""
        return None if self.tokens_of_a_model is None else self.models * self.tokens_of_a_model


def plan_benchmarks(
    recipe: Recipe, teacher_bytes: int, slice_bytes: list[int], counted: Mapping[str, int]
) -> Iterator[BenchmarkPlan]:
    """Each benchmark of a recipe. `counted` has the problems of those whose files were read.

    The teacher, every size and every reference with a checkpoint answer. A reference counts as large as the teacher.
    """
    references = sum(reference.path is not None for reference in recipe.references)
    together = teacher_bytes * (1 + references) + sum(slice_bytes)
    for benchmark in recipe.evaluation.benchmarks:
        yield BenchmarkPlan(
            name=benchmark.name,
            problems=_problems(benchmark, counted),
            runs=benchmark.runs,
            max_new_tokens=benchmark.sampling.max_new_tokens,
            models=1 + len(slice_bytes) + references,
            weight_bytes=0 if recipe.evaluation.endpoint is not None else together,
        )


def _problems(benchmark: Benchmark, counted: Mapping[str, int]) -> int | None:
    """As counted; else as many as the built-in benchmark has, or as are asked at most."""
    built_in = BUILT_IN.get(benchmark.name)
    if benchmark.name in counted:
        return counted[benchmark.name]
    limits = [built_in.problems if built_in else None, benchmark.max_problems]
    return min((limit for limit in limits if limit is not None), default=None)
