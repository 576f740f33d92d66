"""What a run leaves in the terminal."""

import pytest
from records import evaluated, measured

from flows.commands.outcome import print_outcome
from tasks.promote import Verdict
from tasks.records import OrderComparison, Release


@pytest.mark.parametrize(("promoted", "pulled"), [(True, "tiny-m"), (False, "tiny-m:3")])
def test_the_next_command_pulls_what_the_run_registered(
    promoted: bool, pulled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name alone is the champion's, and a family that stays candidate is not that."""
    models = {"l": "tiny-l:3", "m": "tiny-m:3"}
    release = Release(family="tiny", version="1", registration="1", uri="s3://b", models=models, run_id="r", report="x")
    orders = OrderComparison(heldout_tokens=400, cuts=())
    print_outcome(evaluated(measured("m", 2.0)), orders, release, Verdict(promoted=promoted, reason="because"))
    assert capsys.readouterr().out.splitlines()[-1].split() == f"next elastic pull {pulled} -o tiny-m".split()
