"""Laws of how a recipe says what a family is judged by: what is built in, what may be left out, what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainee import AXES, BUDGETS, STAGE

from elastic_core.judging import BUILT_IN, Benchmark, Endpoint, Engine
from elastic_core.recipe import Recipe
from elastic_core.schema import build, to_dict

SUMS = {"name": "sums", "path": "sums.jsonl", "format": "exact"}


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "family": "nano",
        "teacher": {"path": "/models/teacher"},
        "data": {"sources": [{"path": "stdlib://"}]},
        "axes": to_dict(AXES),
        "budgets": [to_dict(budget) for budget in BUDGETS],
        "stages": [to_dict(STAGE)],
    }
    return build(Recipe, data | changes)


def test_the_name_of_a_built_in_benchmark_is_enough_and_a_local_copy_is_read_alike() -> None:
    for name, known in BUILT_IN.items():
        if known.path is not None:
            asked = Benchmark(name=name)
            assert (asked.source.path, asked.source.split, asked.form) == (known.path, known.split, known.format)
        copy = Benchmark(name=name, path="copy.jsonl")
        assert (copy.source.path, copy.form, copy.days) == (
            "copy.jsonl",
            known.format,
            (known.since or "", copy.days[1]),
        )
    assert Benchmark(name="livecodebench-v5", path="*.jsonl").days == ("2024-07-01", "2024-12-31")


def test_ones_own_benchmark_is_three_settings() -> None:
    (asked,) = recipe(evaluation={"benchmarks": [SUMS]}).evaluation.benchmarks
    assert (asked.source.path, asked.form, asked.runs, asked.sampling.temperature) == ("sums.jsonl", "exact", 8, 0.6)


@pytest.mark.parametrize(
    ("model", "named", "in_doubt"),
    [
        ("nano-{size}", "nano-6b", True),
        ("nano-{size}-{digest}", "nano-6b-3f2a00112233", False),
        ("{path}", "/slices/x", False),
        ("one", "one", True),
    ],
)
def test_a_name_with_the_digest_or_the_directory_tells_weights_and_a_gate_takes_no_other(
    model: str, named: str, in_doubt: bool
) -> None:
    served = {"url": "http://h/v1", "model": model}
    endpoint = Endpoint(**served)
    assert endpoint.model_of("6b", "/slices/x", "3f2a00112233445566") == named
    judged = {"benchmarks": [SUMS], "endpoint": served}
    assert recipe(evaluation=judged).evaluation.endpoint == endpoint  # with no gate on it
    assert bool(endpoint.doubt) == in_doubt
    if in_doubt:
        said = (
            f"promotion.benchmarks: the server may still have an earlier run's weights as '{model}'; put {{digest}} or"
        )
        with pytest.raises(ValueError, match=re.escape(said)):
            recipe(evaluation=judged, promotion={"benchmarks": {"sums": 2}})
    else:
        recipe(evaluation=judged, promotion={"benchmarks": {"sums": 2}})


def test_the_page_on_serving_shows_what_a_recipe_may_say() -> None:
    page = (Path(__file__).parents[2] / "infra/serving.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert recipe(**yaml.safe_load(shown)).evaluation.engine == Engine(options="--max-model-len 40960")


def test_an_engine_is_named_with_its_options_and_a_gate_takes_its_scores() -> None:
    engine = {"program": "vllm", "options": "--max-model-len 40960 --quantization 'fp 8'"}
    judged = {"benchmarks": [SUMS], "engine": engine}
    evaluation = recipe(evaluation=judged, promotion={"benchmarks": {"sums": 2}}).evaluation
    assert evaluation.engine is not None and not evaluation.is_decoded
    assert evaluation.engine.arguments == ("--max-model-len", "40960", "--quantization", "fp 8")
    assert recipe(evaluation={"engine": {}}).evaluation.engine == Engine()
    assert recipe().evaluation.is_decoded


PUBLISHED = {"name": "other", "published": {"sums": 50}, "source": "a paper"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "own without path": (
        {"evaluation": {"benchmarks": [{"name": "sums", "format": "exact"}]}},
        r"evaluation.benchmarks\[0\]: benchmark 'sums' needs path and format; those built in are math-500, aime-2024",
    ),
    "a program on the Hub": (
        {"evaluation": {"benchmarks": [{"name": "livecodebench-v5"}]}},
        r"benchmark 'livecodebench-v5' needs path: bring its files here and name them",
    ),
    "one name twice": ({"evaluation": {"benchmarks": [SUMS, SUMS]}}, "evaluation: benchmark 'sums' is named twice"),
    "no URL": (
        {"evaluation": {"endpoint": {"url": "localhost", "model": "m"}}},
        r"evaluation.endpoint: url does not begin with http:// or https://; write http://host:port/v1",
    ),
    "a key in the URL": (
        {"evaluation": {"endpoint": {"url": "https://me:sesame@host/v1", "model": "m"}}},
        r"evaluation.endpoint: url holds a user's name or password; leave it out, and set OPENAI_API_KEY$",
    ),
    "two that answer": (
        {"evaluation": {"endpoint": {"url": "http://h/v1", "model": "m"}, "engine": {}}},
        "evaluation: endpoint and engine are both given; leave out the one that is not to answer",
    ),
    "an unknown engine": (
        {"evaluation": {"engine": {"program": "sglang"}}},
        "evaluation.engine.program is 'sglang'; expected one of: vllm, transformers",
    ),
    "options that end inside a text": (
        {"evaluation": {"engine": {"options": "--chat-template 'a"}}},
        "evaluation.engine: options=.* is not what a shell can read: No closing quotation",
    ),
    "an engine without a GPU for a replica": ({"evaluation": {"engine": {"gpus": 0}}}, "gpus=0 must be greater than 0"),
    "slices that no engine loads": (
        {"evaluation": {"engine": {}}, "ffn_layout": "list"},
        "evaluation.engine: neither vllm nor transformers loads ffn_layout list; choose padded",
    ),
    "a gate to what is not judged": (
        {"promotion": {"benchmarks": {"sums": 2}}},
        r"promotion.benchmarks: 'sums' is not in evaluation.benchmarks, which is empty",
    ),
    "a margin below 0": (
        {"promotion": {"benchmarks": {"sums": -1}}},
        "must give each benchmark a margin of at least 0",
    ),
    "published and not judged": (
        {"evaluation": {"benchmarks": [{"name": "math-500"}]}, "references": [PUBLISHED]},
        "reference 'other': benchmark 'sums' is not one of math-500",
    ),
    "a reference called like a size": (
        {"evaluation": {"benchmarks": [SUMS]}, "references": [PUBLISHED | {"name": "l"}]},
        "reference 'l' has the name of another model; give it its own",
    ),
    "no source": (
        {"evaluation": {"benchmarks": [SUMS]}, "references": [PUBLISHED | {"source": None}]},
        r"references\[0\]: reference 'other' has published scores and no source; say where they stand",
    ),
    "no percentage": (
        {"evaluation": {"benchmarks": [SUMS]}, "references": [PUBLISHED | {"published": {"sums": 101}}]},
        "sums=101.* is not a percentage, from 0 to 100",
    ),
    "nothing": ({"references": [{"name": "other"}]}, "reference 'other' has neither path nor published scores"),
}


@pytest.mark.parametrize(("changes", "fault"), BAD.values(), ids=BAD)
def test_what_cannot_be_judged_is_refused_in_one_line(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        recipe(**changes)
