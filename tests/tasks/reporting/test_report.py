"""The report: its numbers against plain arithmetic, what its page may hold, and the runs it must bear."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from records import CONDITIONS, judged

from elastic_core import cost
from elastic_core.budget import Budget
from elastic_core.comparison import Cut
from elastic_core.files.shapes import MeasuredShapes
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.judging import BUILT_IN, Endpoint
from elastic_core.recipe import DataConfig, DataSource, Evaluation, Optimizer, Recipe, Stage, Teacher
from elastic_core.search import Candidate
from elastic_core.subnet import Subnet, full_subnet, keep_layers
from elastic_core.training.train import BudgetMetrics, StepMetrics
from tasks.records import BudgetEvaluation, Contamination, EvaluationRecord, OrderComparison
from tasks.reporting import drawing, history, numbers, plots, report, summary
from tasks.reporting.benchmarks import answers_table, benchmark_table, notes

CHROMIUM = shutil.which("chromium")
A4_WIDTH = 718  # CSS pixels between margins of a centimetre

MODEL = ModelConfig(
    hybrid_override_pattern="M-M*-M-",
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_groups=2,
    vocab_size=256,
)
AXES = Axes(hidden=(64, 48, 32), ffn=(128, 96, 64), mamba_heads=(8, 6, 4), attention_heads=(4, 2), depth=(7, 6, 5))
RANKING = (0, 1, 3, 6, 2, 5, 4)
HALF = Subnet(
    hidden=32,
    ffn=(64,) * 3,
    mamba_heads=(4,) * 3,
    mamba_head_dim=16,
    attention_heads=(2,),
    layers=keep_layers(RANKING, 5),
)
MIDDLE = Subnet(
    hidden=48,
    ffn=(96,) * 3,
    mamba_heads=(6,) * 3,
    mamba_head_dim=16,
    attention_heads=(4,),
    layers=keep_layers(RANKING, 6),
)
SUBNETS = {"l": full_subnet(MODEL), "m": MIDDLE, "s": HALF}
PARAMS = {name: cost.subnet_params(MODEL, subnet) for name, subnet in SUBNETS.items()}
TEACHER_LOSS = 1.9
LINKS = {"MLflow run": "http://127.0.0.1:5000/#/runs/1", "objects": "s3://families/tiny/v1/"}
PLOTS = {"quality", "orders", "frontier", "loss", "router", "params", "experts", "storage", "anatomy", "accuracy"}


ORDERS = OrderComparison(
    heldout_tokens=8192,
    cuts=(
        Cut(axis="hidden", full=64, size=32, by_importance=0.5, at_random=(1.25, 1.5, 1.75)),
        Cut(axis="mamba_heads", full=8, size=4, by_importance=0.25, at_random=(0.25, 0.125, 0.375)),
    ),
)


def budget(name: str, **changes: object) -> BudgetEvaluation:
    missing = 1 - PARAMS[name] / PARAMS["l"]
    measured = BudgetEvaluation(
        budget=name,
        params=PARAMS[name],
        weight_bytes=4 * PARAMS[name],
        memory_bytes=5 * PARAMS[name],
        cross_entropy=TEACHER_LOSS + 0.01 + 0.2 * missing,
        kl=0.01 + 0.1 * missing,
        cut_cross_entropy=TEACHER_LOSS + 3 * missing,
        random_cut_cross_entropy=TEACHER_LOSS + 5 * missing,
        tokens_per_second=1000.0,
        accuracy=0.5,
        accuracy_by_task={"chain_sum": 0.25, "leg_counting": 0.75},
    )
    return dataclasses.replace(measured, **changes)


def evaluation(*budgets: BudgetEvaluation, **changes: object) -> EvaluationRecord:
    record = EvaluationRecord(
        conditions=CONDITIONS,
        teacher_params=PARAMS["l"],
        teacher_cross_entropy=TEACHER_LOSS,
        teacher_accuracy=0.6,
        heldout_tokens=65_536,
        problems=128,
        budgets=budgets or tuple(budget(name) for name in SUBNETS),
    )
    return dataclasses.replace(record, **changes)


def step_metrics(stage: str, step: int, *, routed: bool, loss: float = 1.0) -> StepMetrics:
    choices = {axis: float(AXES.bind(MODEL).choices(axis)[0]) for axis in Axes.NAMES} if routed else {}
    budgets = {
        name: BudgetMetrics(
            loss=loss,
            kl=loss / (step + 1),
            cross_entropy=2 + loss / (step + 1),
            router_loss=0.0,
            expected_params=float(PARAMS[name]) if routed and name != "l" else 0.0,
            choices=choices if name != "l" else {},
            experts={"expert_load": 1.5, "expert_entropy": 2.0} if routed else {},
        )
        for name in SUBNETS
    }
    return StepMetrics(
        stage=stage,
        step=step,
        steps=40,
        loss=loss,
        budgets=budgets,
        learning_rate=1e-3,
        temperature=1.0,
        gradient_norm=1.0,
        shares={},
        tokens=1000,
        seconds=0.5,
    )


def write_metrics(path: Path, *, routed: bool, steps: int = 40) -> tuple[str, Path]:
    lines = [json.dumps(dataclasses.asdict(step_metrics(path.stem, step, routed=routed))) for step in range(steps)]
    path.write_text("\n".join(lines) + "\n")
    return path.stem, path


def recipe(subnets: Mapping[str, Subnet]) -> Recipe:
    def stage(name: str) -> Stage:
        shares = dict.fromkeys(subnets, 1.0)
        return Stage(
            name=name,
            sequence_length=64,
            batch_size=4,
            steps=40,
            budgets=shares,
            optimizer=Optimizer(learning_rate=1e-3),
        )

    return Recipe(
        family="tiny",
        teacher=Teacher(path="s3://teachers/one"),
        data=DataConfig(sources=(DataSource(path="stdlib://"),)),
        axes=AXES,
        budgets=tuple(Budget(name=name, params=None if name == "l" else PARAMS[name] + 99) for name in subnets),
        stages=(stage("short"), stage("long")),
    )


def write(
    directory: Path,
    *,
    record: EvaluationRecord,
    orders: OrderComparison = ORDERS,
    routed: bool = True,
    stages: Sequence[str] = ("short", "long"),
    links: Mapping[str, str] = LINKS,
    endpoint: Endpoint | None = None,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    subnets = {name: SUBNETS[name] for name in SUBNETS if name in {b.budget for b in record.budgets}}
    metrics = [write_metrics(directory / f"{name}.jsonl", routed=routed) for name in stages]
    return report.write_report(
        directory / "report",
        recipe=dataclasses.replace(recipe(subnets), evaluation=Evaluation(endpoint=endpoint)),
        evaluation=record,
        orders=orders,
        stages=metrics,
        subnets=subnets,
        layer_ranking=RANKING,
        model=MODEL,
        shapes=shapes_of(subnets) if routed else None,
        links=links,
    )


def shapes_of(subnets: Mapping[str, Subnet]) -> MeasuredShapes:
    """Two candidates for each budget but the full one: the chosen subnet, and one that loses more."""
    budgets = {}
    for name, subnet in subnets.items():
        chosen = Candidate(subnet=subnet, cost=PARAMS[name], loss=0.1)
        worse = dataclasses.replace(chosen, subnet=dataclasses.replace(subnet, hidden=subnet.hidden - 8), loss=0.2)
        budgets[name] = (chosen,) if name == "l" else (chosen, worse)
    return MeasuredShapes(tokens=64, budgets=budgets)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run"), record=evaluation())


BARE = evaluation(
    budget("l", accuracy=None, accuracy_by_task={}, random_cut_cross_entropy=math.inf, kl=math.nan),
    teacher_accuracy=None,
    problems=0,
)


@pytest.fixture(scope="module")
def bare_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one budget, without router and problems, and with losses that are not finite."""
    return write(tmp_path_factory.mktemp("bare"), record=BARE, routed=False)


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and the text between tags."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# Numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (95, "95"), (999, "999"), (1000, "1K"), (999_499, "999K"), (999_999, "1M"), (12_310_001_152, "12.3B")],
)
def test_a_count_keeps_three_digits_and_never_an_exponent(count: int, text: str) -> None:
    assert numbers.human_count(count) == text


def test_human_bytes_are_decimal_and_within_half_a_percent() -> None:
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}
    for count in np.geomspace(1, 9e17, 500).astype(int):
        number, unit = numbers.human_bytes(int(count)).split()
        assert float(number) * units[unit] == pytest.approx(count, rel=0.005)
        assert float(number) < 1000


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0.4 s"), (59.4, "59.4 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")]
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert numbers.human_seconds(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(1, "1 GPU"), (2, "2 GPUs"), (2048, "2,048 GPUs"), (0.5, "0.5 GPU")])
def test_counted_says_a_number_of_things(number: float, text: str) -> None:
    assert numbers.counted(number, "GPU") == text


# The budget table


def test_the_table_has_the_teacher_and_then_the_budgets_from_the_largest() -> None:
    rows = summary.summary_table(evaluation(budget("s"), budget("l"), budget("m")))
    assert [row["budget"] for row in rows] == ["teacher", "l", "m", "s"]
    assert [int(row["parameters"].replace(",", "")) for row in rows[1:]] == [PARAMS["l"], PARAMS["m"], PARAMS["s"]]


def test_of_experts_the_table_has_the_parameters_that_a_token_passes_through() -> None:
    rows = summary.summary_table(evaluation(budget("s", active_params=1_234), teacher_active_params=5_678))
    assert [row["active"] for row in rows] == ["5,678", "1,234"]
    assert "active" not in summary.summary_table(evaluation(budget("s")))[0]


def test_recovered_is_the_won_share_of_what_cutting_lost() -> None:
    small = budget("s", cut_cross_entropy=TEACHER_LOSS + 2.0, cross_entropy=TEACHER_LOSS + 0.25)
    rows = summary.summary_table(evaluation(small))
    assert rows[1]["recovered"] == "87.5 %"


@pytest.mark.parametrize(("lost", "shown"), [(0.0499, False), (0.0501, True), (-1.0, False), (math.nan, False)])
def test_no_share_is_taken_of_a_loss_that_noise_may_be(lost: float, shown: bool) -> None:
    """10 standard errors of 0.5 nats over the root of 10,000 tokens are 0.05 nats."""
    small = budget("s", cut_cross_entropy=TEACHER_LOSS + lost, cross_entropy=TEACHER_LOSS - 0.2)
    record = evaluation(small, heldout_tokens=10_000)
    assert (summary.summary_table(record)[1]["recovered"] != "-") == shown
    assert ("recovered" in summary.summary_lines(record)["s"]) == shown
    assert (summary.recovered(record, small) is not None) == shown


def test_the_full_model_recovers_nothing_whatever_the_rounding_of_its_cut() -> None:
    full = budget("l", cut_cross_entropy=TEACHER_LOSS + 1e-9)
    assert summary.summary_table(evaluation(full))[1]["recovered"] == "-"
    assert "recovered" not in summary.summary_lines(evaluation(full))["l"]


@pytest.mark.parametrize(
    ("cut", "above", "tokens", "told"),
    [(2.0, 0.0199, 10**6, False), (2.0, 0.0201, 10**6, True), (0.2, 0.0099, 10**4, False), (0.2, 0.0101, 10**4, True)],
)
def test_a_size_that_training_made_worse_is_told_where_it_is_neither_a_hundredth_nor_chance(
    cut: float, above: float, tokens: int, told: bool
) -> None:
    """Two standard errors of 0.5 nats over the root of 10,000 tokens are 0.01 nats."""
    worse, better = budget("s", cut_cross_entropy=cut, cross_entropy=cut + above), budget("l", cut_cross_entropy=9.0)
    record = evaluation(better, worse, heldout_tokens=tokens)
    assert [found.budget for found in summary.worsened(record)] == ["s"] * told
    assert [line.partition(" is worse")[0] for line in summary.training_warnings(record)] == ["s"] * told


def test_answers_that_were_cut_off_are_told_with_each_models_share() -> None:
    record = evaluation(budget("s", cut_answers=0.25), budget("l", cut_answers=0.0), teacher_cut_answers=0.5)
    (warning,) = summary.evaluation_warnings(record)
    assert warning.startswith("answers to problems were cut off at max_new_tokens (teacher 50.0 %, s 25.0 %) and count")
    assert summary.evaluation_warnings(evaluation(budget("s", cut_answers=0.0))) == []


def test_what_was_not_measured_is_a_dash() -> None:
    record = evaluation(budget("s", accuracy=None, kl=math.nan), teacher_accuracy=None)
    rows = summary.summary_table(record)
    assert [row["accuracy"] for row in rows] == ["-", "-"]
    assert rows[1]["KL"] == "-"


def test_the_summary_says_share_of_parameters_loss_and_recovery() -> None:
    small = budget(
        "s", params=PARAMS["l"] // 4, cross_entropy=TEACHER_LOSS + 0.12, cut_cross_entropy=TEACHER_LOSS + 1.2
    )
    line = summary.summary_lines(evaluation(small))["s"]
    assert (
        line
        == "25 % of the parameters, loss 0.120 nats a token above the teacher's, 90 % of what cutting lost is recovered"
    )


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (-0.0001, "loss equal to the teacher's"),
        (-0.02, "loss 0.020 nats a token below the teacher's"),
        (math.inf, "loss inf nats a token above the teacher's"),
    ],
)
def test_a_loss_is_said_beside_the_teachers_with_one_sign(delta: float, words: str) -> None:
    line = summary.summary_lines(evaluation(budget("l", cross_entropy=TEACHER_LOSS + delta)))["l"]
    assert line.endswith(words)


def test_a_markdown_table_gives_back_its_rows() -> None:
    table = summary.summary_table(evaluation())
    rows = [*table, dict.fromkeys(table[0], "a|b\nc")]
    lines = summary.markdown_table(rows).splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == list(rows[0])
    assert cells[2:-1] == [list(row.values()) for row in rows[:-1]]
    assert cells[-1] == ["a\\|b c"] * len(rows[0])


# The order of importance


SCORES = (
    judged("teacher", 0.9),
    judged("l", 0.875),
    judged("l", 0.25, benchmark="aime", score=None),
    judged("other", 0.963, score=None, source="a paper, table <1>"),
)


def test_the_table_of_benchmarks_has_every_model_with_its_error_and_marks_what_was_published() -> None:
    found = {row["model"]: (row["sums"], row["aime"]) for row in benchmark_table(evaluation(scores=SCORES))}
    assert found == {
        "teacher": ("90.0 ± 2.0", "-"),
        "l": ("87.5 ± 2.0", "25.0"),
        "other (published)": ("96.3", "-"),
    }
    answers = answers_table(evaluation(scores=SCORES))
    assert [(row["model"], row["answered by"]) for row in answers] == [("teacher", "vllm 0.99"), ("l", "vllm 0.99")]
    assert not benchmark_table(evaluation())


def test_the_report_has_scores_shares_without_an_answer_tokens_sources_and_contamination(tmp_path: Path) -> None:
    there = Contamination(benchmark="sums", problems=400, found=3, short=1, first=("a",))
    page = write(tmp_path, record=evaluation(scores=SCORES, contamination=(there,)))
    markdown = page.with_name("results.md").read_text()
    for text in (Elements(page).text, markdown):
        for found in ("87.5 ± 2.0", "other (published)", "a paper, table <1>", "12.5 %", "4,096", "0.8 %"):
            assert found in text
    stored = json.loads(page.with_name("results.json").read_text())["evaluation"]["scores"]
    assert [(score["model"], score["accuracy"]) for score in stored] == [(s.model, s.accuracy) for s in SCORES]


def test_no_plot_shows_the_source_of_a_formula(tmp_path: Path) -> None:
    """Its texts are plain; an axis of less than a decade would write its ticks as TeX."""
    assert "$" not in Elements(write(tmp_path, record=evaluation())).text


@pytest.mark.services
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; Debian's package is `chromium`")
def test_on_paper_no_table_is_cut_off(tmp_path: Path) -> None:
    """Two references and two baselines beside the family, on six benchmarks."""
    rows = ("teacher", "l", "m", "s", "nemotron-nano-9b-v2", "m-separate", "m-from-scratch")
    scores = [judged(row, 0.5, benchmark=name) for row in rows for name in BUILT_IN]
    scores += [judged("qwen3-8b", 0.5, benchmark=name, score=None, source="x") for name in BUILT_IN]
    page = write(tmp_path, record=evaluation(scores=tuple(scores)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        paper = browser.new_page(viewport={"width": A4_WIDTH, "height": 1000})
        paper.emulate_media(media="print")
        paper.goto(page.as_uri())
        ends = paper.evaluate("[...document.querySelectorAll('td')].map(cell => cell.getBoundingClientRect().right)")
        browser.close()
    assert len(ends) > 8 * 6 and max(ends) <= A4_WIDTH


def test_the_report_doubts_scores_of_a_server_whose_names_tell_no_weights(tmp_path: Path) -> None:
    endpoint = Endpoint(url="http://h/v1", model="nano-{size}")
    page = write(tmp_path, record=evaluation(scores=SCORES), endpoint=endpoint)
    for text in (Elements(page).text, page.with_name("results.md").read_text()):
        assert "earlier run's weights as 'nano-{size}'" in text
    assert notes(evaluation(scores=SCORES), dataclasses.replace(endpoint, model="{digest}")) == notes(
        evaluation(scores=SCORES)
    )


def test_a_cut_that_loses_no_less_than_random_orders_is_warned_of_in_the_report(page: Path) -> None:
    """0.25 is the mean of the random orders of the Mamba heads; the hidden channels lose 0.5 of the random 1.5."""
    rows = summary.order_table(ORDERS)
    assert [row["cut"] for row in rows] == ["hidden channels 64 to 32", "Mamba heads 8 to 4"]
    assert [row["at random"] for row in rows] == ["1.5000 ± 0.2500", "0.2500 ± 0.1250"]
    assert [row["importance loses less"] for row in rows] == ["yes", "no"]
    (warning,) = summary.order_warnings(ORDERS)
    assert warning.startswith("Mamba heads 8 to 4: the order of importance is no better than a random one")
    for text in (Elements(page).text, (page.parent / "results.md").read_text()):
        assert warning in text
        assert all(cell in text for row in rows for cell in row.values())
    written = json.loads((page.parent / "results.json").read_text())["orders"]
    assert [(cut["axis"], cut["by_importance"], cut["beats_random"]) for cut in written["cuts"]] == [
        ("hidden", 0.5, True),
        ("mamba_heads", 0.25, False),
    ]


@pytest.mark.parametrize("lost", [(), (math.nan, math.inf), (0.0, -0.1)], ids=["none", "not finite", "nothing lost"])
def test_a_comparison_with_nothing_to_draw_is_reported_without_its_plot(tmp_path: Path, lost: Sequence[float]) -> None:
    cuts = tuple(Cut(axis="ffn", full=128, size=64, by_importance=value, at_random=(value,) * 2) for value in lost)
    orders = OrderComparison(heldout_tokens=8192, cuts=cuts)
    page = write(tmp_path, record=BARE, orders=orders, stages=())
    assert not (page.parent / "orders.png").exists()
    assert len(summary.order_warnings(orders)) == len(lost)
    assert ("Order of importance" in Elements(page).text) == bool(cuts)


# Metrics


def test_the_last_record_of_a_step_counts_and_an_unfinished_line_is_passed_over(tmp_path: Path) -> None:
    def line(step: int, loss: float) -> str:
        return json.dumps(dataclasses.asdict(step_metrics("short", step, routed=True, loss=loss)))

    path = tmp_path / "metrics.jsonl"
    killed = line(2, 7.0)[:60]
    path.write_text("\n".join([line(0, 1.0), line(1, 2.0), line(2, 3.0), killed + line(1, 9.0), line(1, 4.0), killed]))
    steps = history.read_metrics(path)
    assert [(m.step, m.loss) for m in steps] == [(0, 1.0), (1, 4.0), (2, 3.0)]
    assert steps[1] == step_metrics("short", 1, routed=True, loss=4.0)


@pytest.mark.parametrize("spoiled", [b'{"step": "\xff"}', b'{"stfp": 1}', b"2", b"[2]", b"null"])
def test_a_line_that_holds_no_step_is_passed_over(spoiled: bytes, tmp_path: Path) -> None:
    whole = json.dumps(dataclasses.asdict(step_metrics("short", 0, routed=True, loss=1.0))).encode()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(spoiled + b"\n" + whole + b"\n")
    assert [m.step for m in history.read_metrics(path)] == [0]


def test_a_number_that_is_not_finite_is_left_out_of_the_curves(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    records = [step_metrics("short", step, routed=True, loss=loss) for step, loss in enumerate([1.0, math.nan, 3.0])]
    path.write_text("\n".join(json.dumps(dataclasses.asdict(record)) for record in records))
    (stage,) = history.read_stages([("short", path)])
    steps, values = stage.curve("s", lambda b: b.loss)
    assert steps.tolist() == [0, 2]
    assert values.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("width", [1, 3, 8])
def test_the_rolling_mean_of_a_constant_is_that_constant(width: int) -> None:
    np.testing.assert_allclose(drawing.rolling_mean(np.full(20, 2.5), width), 2.5, rtol=1e-12)


def test_the_rolling_mean_averages_the_neighbours() -> None:
    values = np.arange(10.0) ** 2
    middle = drawing.rolling_mean(values, 3)[1:-1]
    np.testing.assert_allclose(middle, [values[i - 1 : i + 2].mean() for i in range(1, 9)], rtol=1e-12)


# The files


def test_every_plot_is_a_picture_with_something_in_it(page: Path) -> None:
    assert {path.stem for path in page.parent.glob("*.png")} == PLOTS
    for path in page.parent.glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 200, path
        assert 0.005 < (pixels != 255).any(-1).mean() < 0.9, path


def test_the_page_and_the_markdown_hold_every_number_of_the_table(page: Path) -> None:
    text, markdown = Elements(page).text, (page.parent / "results.md").read_text()
    for row in summary.summary_table(evaluation()):
        assert all(cell in text and cell in markdown for cell in row.values())
    for line in summary.summary_lines(evaluation()).values():
        assert line in text
        assert line in markdown


def test_results_json_holds_what_was_measured(page: Path) -> None:
    results = json.loads((page.parent / "results.json").read_text())
    for measured, written in zip(evaluation().budgets, results["evaluation"]["budgets"], strict=True):
        fields = dataclasses.asdict(measured)
        assert {name: written[name] for name in fields} == fields
        assert written["subnet"]["layers"] == list(SUBNETS[measured.budget].layers)
    assert [stage["tokens"] for stage in results["stages"]] == [40_000, 40_000]
    assert results["storage_bytes"] == {
        "separate checkpoints": 4 * sum(PARAMS.values()),
        "one elastic checkpoint": 4 * PARAMS["l"],
        "nested storage": 4 * PARAMS["l"],
    }


def test_results_json_is_strict_json_even_for_a_loss_that_is_not_finite(bare_page: Path) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    text = (bare_page.parent / "results.json").read_text()
    (written,) = json.loads(text, parse_constant=refuse)["evaluation"]["budgets"]
    assert written["random_cut_cross_entropy"] is None
    assert written["kl"] is None


def test_the_page_fetches_nothing(page: Path) -> None:
    elements = Elements(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in elements.tags
    }
    for tag, attributes in elements.tags:
        addresses = [attributes[name] or "" for name in ("src", "href", "xlink:href", "srcset") if name in attributes]
        assert all(address.startswith("#") or (tag == "a" and address in LINKS.values()) for address in addresses)
    text = page.read_text()
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert set(re.findall(r"https?://[^\"<]*", text)) <= set(LINKS.values())
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
    ) in (elements.tags)


def test_every_colour_of_the_page_belongs_to_both_themes(page: Path) -> None:
    text = page.read_text()
    dark = text.index("prefers-color-scheme")
    defined = [set(re.findall(r"--(\w+):", part)) for part in (text[:dark], text[dark:])]
    assert defined[0] == defined[1] == set(drawing.THEME)
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= defined[0]
    body = text[text.index("<body>") :]
    assert not re.findall(r"(?:fill|stroke|color|background)\s*[:=]\s*\"?(#[0-9a-fA-F]{3,8})", body)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    attack = "<script>alert('$x_{$')</script>--><svg onload=alert(1)>"
    links = {
        attack: "javascript:alert(1)",
        "store": "http://user:secret-word@127.0.0.1/",
        "quote": 'http://a"onclick="b',
    }
    record = evaluation(budget("l", accuracy_by_task={attack: 0.5, "多": 0.5}))
    page = write(tmp_path, record=record, routed=False, links=links)
    elements = Elements(page)
    assert "script" not in {tag for tag, _ in elements.tags}
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert not [a for _, a in elements.tags if (a.get("href") or "").startswith("javascript:")]
    assert attack in elements.text
    for path in (page, page.parent / "results.json"):
        assert "secret-word" not in path.read_text()


# Runs without this or that


def test_one_budget_without_router_and_problems_leaves_their_plots_out(bare_page: Path) -> None:
    drawn = PLOTS - {"frontier", "router", "params", "experts", "accuracy"}
    assert {path.stem for path in bare_page.parent.glob("*.png")} == drawn
    text = Elements(bare_page).text
    assert {plot.name for plot in plots.PLOTS if plot.title in text} == drawn


def test_the_same_run_is_reported_in_the_same_bytes(bare_page: Path, tmp_path: Path) -> None:
    again = write(tmp_path, record=BARE, routed=False)
    first, second = ({path.name: path.read_bytes() for path in page.parent.iterdir()} for page in (bare_page, again))
    assert first == second


def test_a_run_without_metrics_is_reported(tmp_path: Path) -> None:
    page = write(tmp_path, record=BARE, stages=(), routed=False)
    assert {path.stem for path in page.parent.glob("*.png")} == {"quality", "orders", "storage", "anatomy"}


def test_drawing_is_silent_from_a_cold_start_and_opens_no_window(tmp_path: Path) -> None:
    program = (
        "import runpy, sys, pathlib; t = runpy.run_path(sys.argv[1]); "
        "t['write'](pathlib.Path(sys.argv[2]), record=t['BARE'], stages=()); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    unusable = tmp_path / "file"  # where matplotlib finds no cache, it has to build one, and says so
    unusable.touch()
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program, __file__, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={"MPLCONFIGDIR": str(unusable / "matplotlib"), "PYTHONPATH": f"{root}:{root / 'tests/support'}"},
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
