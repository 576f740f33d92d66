"""What a run leaves in the terminal."""

import pytest

from flows.commands.outcome import print_outcome
from tasks.promote import Verdict
from tasks.records import BudgetEvaluation, EvaluationRecord, Release


@pytest.mark.parametrize(("promoted", "pulled"), [(True, "tiny-m"), (False, "tiny-m:3")])
def test_the_next_command_pulls_what_the_run_registered(
    promoted: bool, pulled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name alone is the champion's, and a family that stays candidate is not that."""
    measured = BudgetEvaluation(
        budget="m",
        params=1,
        weight_bytes=4,
        memory_bytes=8,
        cross_entropy=2.0,
        kl=0.1,
        cut_cross_entropy=3.0,
        random_cut_cross_entropy=4.0,
        tokens_per_second=1.0,
    )
    evaluation = EvaluationRecord(
        teacher_params=1,
        teacher_cross_entropy=1.0,
        teacher_accuracy=None,
        heldout_tokens=400,
        problems=0,
        budgets=(measured,),
    )
    release = Release(
        family="tiny", version="1", uri="s3://b", models={"l": "tiny-l:3", "m": "tiny-m:3"}, run_id="r", report="x"
    )
    print_outcome(evaluation, release, Verdict(promoted=promoted, reason="because"))
    assert capsys.readouterr().out.splitlines()[-1].split() == f"next elastic pull {pulled} -o tiny-m".split()
