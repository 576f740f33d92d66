"""Laws of the sandbox: a program gets the right verdict, and a hostile one harms nothing.

`why_not_isolated` has seen the bound of processes hold, and no network, before any of them runs.
"""

import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tasks.judging.problems import Case, Cases
from tasks.judging.programs import fault, same_text, same_value
from tasks.judging.sandbox import FIRST_USER, Limits, Sandbox, require_isolation, why_not_isolated
from tasks.judging.seccomp import seccomp_filter

PATIENT = Limits(cpu_seconds=60, clock_seconds=600)  # for programs that end by themselves, on a busy machine
SHORT = Limits(cpu_seconds=1.5, clock_seconds=3)


@pytest.fixture(scope="module", autouse=True)
def isolated() -> None:
    """Skip where this machine has no bubblewrap that works, and nowhere else: there our own way must work."""
    if shutil.which("bwrap") is None:
        pytest.skip("programs are isolated by bubblewrap, which is not installed")
    plain = ["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"]
    if (done := subprocess.run(plain, capture_output=True, text=True)).returncode:
        pytest.skip(f"bubblewrap does not work here: {done.stderr.strip()}")
    if os.geteuid() == 0 and str(2**32 - 1) not in Path("/proc/self/uid_map").read_text():
        pytest.skip("root of a container without users of its own cannot become another user")
    assert why_not_isolated() is None


@pytest.fixture(autouse=True)
def nothing_remains(isolated: None) -> Iterator[None]:
    """After each test no process of the sandbox's is left."""
    yield
    deadline = time.monotonic() + 20
    while remaining := processes_of_the_sandbox():
        assert time.monotonic() < deadline, f"still running: {remaining}"
        time.sleep(0.02)


def processes_of_the_sandbox() -> list[int]:
    user = FIRST_USER + threading.get_native_id()
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    users = {process.pid for process in psutil.process_iter(["uids"]) if process.info["uids"].real == user}
    return sorted(users if os.geteuid() == 0 else ours)


def ending(program: str, limits: Limits = PATIENT, given: str = "") -> str:
    return Sandbox(limits=limits).run(program, given).ending


def output(program: str, given: str = "") -> str:
    outcome = Sandbox(limits=PATIENT).run(program, given)
    assert outcome.ending == "ended", outcome
    return outcome.output


# Programs that behave


def test_a_program_reads_and_prints() -> None:
    assert output("a, b = map(int, input().split())\nprint(a + b)", "2 3\n") == "5\n"
    assert output("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))", "1 2\n3") == "6\n"
    assert output("def main():\n    print(len(open(0).read()))\nif __name__ == '__main__':\n    main()", "abc") == "3\n"


def test_a_program_may_leave_out_the_usual_imports_and_end_early() -> None:
    assert output("print(Counter('aab')['a'], gcd(4, 6), inf)\nexit(3)") == "2 2 inf\n"


def test_what_a_program_finds_without_importing_it_is_what_livecodebench_gives_it() -> None:
    program = """
print(pow(2, 10, 1000), abs(-1), copy.deepcopy([1]), datetime.datetime(2024, 1, 1).year, bisect.bisect_left([1], 1))
print(bisect_left([1, 2], 2), sqrt(4), reduce(add, [1, 2]), stdin.read(), open(0).read(), List, maxsize > 1)
"""
    assert output(program, "x") == "24 1 [1] 2024 0\n1 2.0 3 x  typing.List True\n"
    assert ending("os.getpid()") == "failed"


def test_a_program_may_recurse_and_use_threads() -> None:
    program = """
import sys, threading
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
threading.stack_size(1 << 27)
thread = threading.Thread(target=lambda: print(depth(20000)))
thread.start(); thread.join()
"""
    assert output(program) == "20000\n"


def test_a_function_gets_its_arguments_and_gives_its_result() -> None:
    method = """
class Solution:
    def add(self, a: int, b: List[int]) -> int:
        print("x")
        return a + sum(b)
"""
    sandbox = Sandbox(limits=PATIENT)
    assert not fault(method, Cases((Case("1\n[2, 3]", "6"), Case("0\n[]", "0")), "add"), sandbox)
    assert fault(method, Cases((Case("1\n[2, 3]", "7"),), "add"), sandbox)
    assert not fault("def pair(a):\n    return a, None", Cases((Case('"x"', '["x", null]'),), "pair"), sandbox)
    numpy = "import numpy\ndef pair(a):\n    return [numpy.int64(a), numpy.arange(a)]"
    assert not fault(numpy, Cases((Case("2", "[2, [0, 1]]"),), "pair"), sandbox)
    assert fault("def other(a):\n    return a", Cases((Case('"x"', '"x"'),), "pair"), sandbox)


def test_every_test_must_pass() -> None:
    tests = Cases((Case("1", "2"), Case("2", "4"), Case("3", "6")))
    sandbox = Sandbox(limits=PATIENT)
    assert not fault("print(2 * int(input()))", tests, sandbox)
    assert fault("print(min(4, 2 * int(input())))", tests, sandbox)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("  1 2 \n3", "1 2\n3", True),
        ("1.0 2", "1 2", True),
        ("1 2 3", "1 2\n3", False),
        ("Yes", "YES", False),
        ("", "0", False),
        ("0.333333333", "0.333333334", False),
        ("a 1", "a 1.0", False),
    ],
)
def test_outputs_are_compared_line_by_line(ours: str, theirs: str, same: bool) -> None:
    assert same_text(ours, theirs) == same


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("[1, 2]", "[1,2]", True),
        ("1.0", "1", True),
        ("true", "1", False),
        ("", "null", False),
        ("[1]", "1", False),
        ("[" * 99999, "1", False),
    ],
)
def test_results_are_compared_as_values(ours: str, theirs: str, same: bool) -> None:
    assert same_value(ours, theirs) == same


# Programs that fail, by mistake or by intent


def test_an_exception_fails() -> None:
    assert ending("print(1)\n1 / 0") == "failed"
    assert ending("def broken(:") == "failed"
    assert ending("input()") == "failed"
    assert ending("x = '\0'") == "failed"
    assert ending("x = '\ud83d'", given="\ud83d") == "ended"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import signal\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ],
    ids=["loops", "sleeps", "ignores signals"],
)
def test_a_program_without_end_is_ended(program: str) -> None:
    assert ending(program, SHORT) == "slow"


def test_a_program_that_does_not_compute_is_no_slower_on_a_busy_machine() -> None:
    """What waits for a processor takes as little of its time as what sleeps."""
    limits = Limits(cpu_seconds=1.5, clock_seconds=600)
    assert ending("import time\ntime.sleep(2)\nprint(1)", limits) == "ended"


@pytest.mark.parametrize("waits", [True, False], ids=["one after another", "at once"])
def test_the_time_of_all_its_processes_counts(waits: bool) -> None:
    """None of the six computes for as long as the limit, and together they do."""
    program = f"""
import os, time
for _ in range(5):
    if os.fork() == 0:
        while time.process_time() < 1: pass
        os._exit(0)
    if {waits}: os.wait()
if not {waits}: time.sleep(1000)
"""
    assert ending(program, Limits(cpu_seconds=3, clock_seconds=600)) == "slow"


def test_a_fork_bomb_has_a_bounded_number_of_processes() -> None:
    program = """
import os, time
print("alive", flush=True)
while True:
    try:
        if os.fork() == 0:
            print("alive", flush=True)
    except OSError:
        time.sleep(0.05)
"""
    limits = Limits(clock_seconds=4)
    outcome = Sandbox(limits=limits).run(program, "")
    assert outcome.ending == "slow"
    assert 2 <= outcome.output.count("alive") <= limits.processes


def test_a_program_that_leaves_a_daemon_takes_it_along() -> None:
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
print(1)
"""
    assert output(program).startswith("1\n")


def test_memory_is_bounded_for_one_process_and_for_all() -> None:
    assert ending("x = bytearray(8 << 30)") == "failed"
    together = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        break
x = bytearray(b"x") * (150 << 20)
time.sleep(1000)
"""
    assert ending(together, Limits(memory_bytes=300 << 20)) == "large"


def test_files_and_output_are_bounded() -> None:
    big = "with open('/tmp/big', 'wb') as f:\n    for _ in range(1000):\n        f.write(bytes(1 << 20))"
    assert ending(big) == "failed"
    many = "for i in range(100):\n    with open(f'/tmp/{i}', 'wb') as f:\n        f.write(bytes(8 << 20))"
    assert ending(many) == "failed"
    assert ending("opened = [open('/tmp/x', 'w') for _ in range(1000)]") == "failed"
    assert ending("while True: print('x' * 100000)") == "failed"


def test_nothing_of_this_machine_can_be_read_or_written(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text("secret")
    assert ending(f"print(open({str(answers)!r}).read())") == "failed"
    assert ending(f"open({str(answers)!r}, 'w').write('forged')") == "failed"
    assert answers.read_text() == "secret"
    for path in ("/x", "/dev/shm/x", "/usr/x", "/program.py"):
        assert ending(f"open({path!r}, 'w')") == "failed", path
    assert output("import os\nprint(sorted(os.environ))") == "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'PWD']\n"
    assert "secret" not in output("import os\nprint([n for n in os.listdir('/proc/self/fd')])")


def test_a_socket_reaches_nobody() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        assert ending(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)") == "failed"
        with pytest.raises(TimeoutError):
            server.accept()
    assert output("import socket\nprint([n for _, n in socket.if_nameindex()])") in ("['lo']\n", "[]\n")


def test_a_program_cannot_kill_what_is_not_its_own() -> None:
    assert output("import os\nprint([n for n in os.listdir('/proc') if n.isdigit() and int(n) > 9])") == "[]\n"
    assert ending("import os\nassert os.getpid() < 9 and os.getuid()\nos.kill(-1, 9)") in ("ended", "failed")
    assert ending(f"import os\nos.kill({os.getpid()}, 9)") == "failed"


def test_a_program_cannot_raise_its_limits() -> None:
    assert ending("import resource as r\nr.setrlimit(r.RLIMIT_NPROC, (1000, 1000))") == "failed"
    assert ending("import os\nos.setuid(0)") == "failed"


def test_a_program_cannot_make_file_systems_or_memory_that_is_no_process_s() -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(call, *arguments):
    return call(*arguments) == -1 and ctypes.get_errno() in (1, 38)
print(refused(libc.unshare, 0x10000000), refused(libc.unshare, 0x00020000))
print(refused(libc.syscall, 56 if os.uname().machine == "x86_64" else 220, 0x10000000 | 17, 0, 0, 0, 0))
print(refused(libc.mount, b"x", b"/tmp", b"tmpfs", 0, None))
print(refused(libc.shmget, 0, 1 << 20, 0o1600), refused(libc.ptrace, 0, 0, 0, 0))
try:
    os.memfd_create("x")
except PermissionError:
    print(True)
"""
    assert set(output(program).split()) == {"True"}


def test_the_filter_is_whole_on_each_architecture_and_refused_on_others() -> None:
    for machine in ("x86_64", "aarch64"):
        steps = list(struct.iter_unpack("=HBBI", seccomp_filter(machine)))
        assert steps[-1] == (0x06, 0, 0, 0x7FFF0000)
        assert all(at + 1 + max(holds, fails) < len(steps) for at, (_, holds, fails, _) in enumerate(steps[:-1]))
    with pytest.raises(ValueError, match="no filter of system calls is known for riscv64"):
        seccomp_filter("riscv64")


# The way without isolation, and its refusal


def test_without_isolation_a_program_still_has_limits() -> None:
    def bare(limits: Limits) -> Sandbox:
        return Sandbox(limits=limits, isolated=False)

    assert bare(PATIENT).run("print(input())", "hi").output == "hi\n"
    assert bare(SHORT).run("while True: pass", "").ending == "slow"
    assert bare(PATIENT).run("x = bytearray(8 << 30)", "").ending == "failed"
    assert bare(PATIENT).run("while True: print('x' * 100000)", "").ending == "failed"


def test_a_machine_without_bubblewrap_refuses_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    require_isolation()
    monkeypatch.setenv("PATH", "/nowhere")
    why_not_isolated.cache_clear()
    with pytest.raises(ValueError, match=r"there is no bwrap; install bubblewrap 0\.7 or later, .* unsafe_code"):
        require_isolation()
    why_not_isolated.cache_clear()


def test_a_program_that_does_not_start_is_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.judging.sandbox.INTERPRETER", ("/usr", "/dev/null/missing"))
    monkeypatch.setattr("os.path.exists", lambda path: True)
    with pytest.raises(RuntimeError, match="a program did not start: bwrap: "):
        Sandbox().run("print(1)", "")
