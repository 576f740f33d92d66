"""What a user reads in the terminal: lines of ours, none of a library's, and nothing about what they never set."""

import errno
import os
import pty
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from micro import ELASTIC, Command, Run
from progress import STEP

pytestmark = pytest.mark.services

# Python's warnings, tracebacks, lines of libraries' code, and the bars of tqdm.
NOT_OURS = re.compile(r"\w*Warning\b|Traceback \(most recent|site-packages|\d+%\|")
# The fixture's environment names no service, so that no message may ask to look at one's variable.
VARIABLE = re.compile(r"\b(AWS|MLFLOW|PREFECT|ELASTIC)_[A-Z_]+")
# What a run writes to standard error while it goes on.
# How fast a step goes and how long it takes is shown where it is slow enough to tell; a stage says its losses, too.
PROGRESS = re.compile(r".+: \d+ %(, [\d,]+ \w+/s)?(, [\w ]+ left)?(, loss( \w+ [\d.]+,?)+( [\d,]+ tokens/s)?)?")
DOUBTFUL = re.compile(r".+: the order of importance is no better than a random one; .+")

COMMANDS: dict[str, Callable[[Run, Path], list[str]]] = {
    "plan": lambda run, out: ["plan", "nano-12b"],
    "profile": lambda run, out: ["profile", str(run.family), "-o", str(out / "table.json"), "--context", "32"],
    "slice": lambda run, out: ["slice", str(run.family), "--params", "20000", "-o", str(out / "slice")],
    "pull": lambda run, out: ["pull", "micro-s", "-o", str(out / "pulled")],
    "eval": lambda run, out: [
        *("eval", str(run.family), "--budget", "s", "--sequence-length", "32"),
        *("--heldout", str(run.directory("corpus") / "heldout.safetensors")),
    ],
    "generate": lambda run, out: ["generate", str(run.family), "1+2", "--budget", "s", "--max-new-tokens", "4"],
    "gc": lambda run, out: ["gc"],
    "status": lambda run, out: ["status"],
    "down": lambda run, out: ["down"],
}


def test_a_run_says_its_steps_and_nothing_else(finished: Run) -> None:
    for line in finished.stderr.splitlines():
        assert any(ours.fullmatch(line) for ours in (STEP, PROGRESS, DOUBTFUL)), line
    for text in (finished.stdout, finished.stderr):
        assert not NOT_OURS.search(text)
        assert not VARIABLE.search(text)


def test_the_outcome_warns_of_the_same_cuts_as_the_log_and_the_report(finished: Run) -> None:
    page = Path(re.search(r"^report +(.*)$", finished.stdout, re.MULTILINE)[1])
    logged = [line for line in finished.stderr.splitlines() if DOUBTFUL.fullmatch(line)]
    told = re.findall(r"^warning +(.*)$", finished.stdout, re.MULTILINE)
    assert [line for line in told if DOUBTFUL.fullmatch(line)] == logged
    assert re.findall(r"^Warning: (.*)\.$", (page.parent / "results.md").read_text(), re.MULTILINE) == told


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_only_what_it_is_asked_for(name: str, finished: Run, command: Command, tmp_path: Path) -> None:
    done = command(*COMMANDS[name](finished, tmp_path))
    assert done.returncode == (1 if name == "status" else 0), done.stderr  # nothing is up
    assert done.stderr == ""
    assert done.stdout.strip()
    assert not NOT_OURS.search(done.stdout)
    assert not VARIABLE.search(done.stdout)


@pytest.mark.parametrize("name", ["eval", "generate", "pull"])
@pytest.mark.slow
def test_a_command_in_a_terminal_shows_no_line_of_a_library(
    name: str, finished: Run, command: Command, tmp_path: Path
) -> None:
    shown = in_a_terminal(command, *COMMANDS[name](finished, tmp_path))
    assert shown.strip()
    assert not NOT_OURS.search(shown), shown


@pytest.mark.slow
def test_a_run_in_a_terminal_shows_no_line_of_a_library(finished: Run, command: Command) -> None:
    shown = in_a_terminal(command, "run", str(command.recipe), "evaluation.max_new_tokens=2")
    assert "registered" in shown
    assert not NOT_OURS.search(shown), shown


def in_a_terminal(command: Command, *arguments: str) -> str:
    """What the command shows where standard output and error are a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(Path(__file__).parents[2])
        os.execve(ELASTIC[0], [*ELASTIC, *arguments], command.environment())
    shown = b""
    while True:
        try:
            shown += (more := os.read(terminal, 65536))
        except OSError as error:
            assert error.errno == errno.EIO  # as Linux says that the other side has closed
            break
        if not more:
            break
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown.decode(errors="replace")
