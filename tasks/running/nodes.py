"""What the nodes that train one stage together say to one another, whoever started them.

The first does the step: it has the lease, follows the curves, and writes the result. On each a launcher (torchrun) runs
that node's processes. All begin together, and when one fails all end; then the first decides whether to begin again.
"""

import signal
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Protocol

from elastic_core.recipe import Stage
from elastic_core.training.faults import Fault
from elastic_core.training.job import TrainJob
from tasks.settings import ServiceError

JOIN_SECONDS = 86_400  # the others may first have to bring what they read; whether one is lost is known elsewhere


class NodeLost(ServiceError):
    """A node that trained a stage with others is gone; the stage goes on with those that are left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How one start of a job ended, where that is not its end.

    `exits` has the exit codes of the processes that failed, by rank; `last_step` is -1 if no step was done; `said` is
    the log's last line.
    """

    fault: Fault | None
    exits: dict[str, int]
    code: int | None
    last_step: int
    said: str

    @property
    def signals(self) -> dict[str, str]:
        """The names of the signals that killed processes, by rank."""
        return {rank: _signal_name(-code) for rank, code in self.exits.items() if code < 0}

    @property
    def may_pass(self) -> bool:
        """Whether another start may get further: a process was killed, or was short of memory or peers halfway."""
        if self.fault is not None and self.fault.kind == "own":
            return False
        if self.fault is not None and not self.signals:
            return self.last_step >= 0
        return bool(self.signals) or (self.code is not None and self.code < 0)

    def text(self) -> str:
        """What happened, on one line."""
        told = f": {self.fault.message}" if self.fault is not None else ""
        if self.signals:
            return "; ".join(f"process {rank} was killed ({name})" for rank, name in self.signals.items()) + told
        if self.fault is not None:
            return self.fault.message
        if self.exits:  # with neither signal nor report: before our code could run
            return f"cannot begin: {self.said}"
        how = _signal_name(-self.code) if self.code is not None and self.code < 0 else f"exit code {self.code}"
        return f"torchrun ended ({how}), and its log with: {self.said}"


def of_all(ends: Sequence[End]) -> End:
    """The end of a start as a whole, of those of its nodes, the first one's first.

    One with a fault of its own or a killed process is why the others lost their peer.
    """
    exits = {rank: code for end in ends for rank, code in end.exits.items()}
    cause = min(ends, key=lambda end: (end.fault is None or end.fault.kind != "own", not end.signals, not end.exits))
    return replace(cause, exits=exits, last_step=max(end.last_step for end in ends))


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the launchers of a start meet: this one is that of the node `number`; the first listens at `address`."""

    nodes: int = 1
    number: int = 0
    address: str = ""
    port: int = 0

    @property
    def arguments(self) -> list[str]:
        """What tells torchrun."""
        if self.nodes == 1:
            return ["--standalone"]
        where = [f"--master-addr={self.address}", f"--master-port={self.port}", f"--rdzv-conf=timeout={JOIN_SECONDS}"]
        return [f"--nnodes={self.nodes}", f"--node-rank={self.number}", *where]


ALONE = Meeting()


class Others(Protocol):
    """The nodes that train a stage with this one, the first."""

    def start(self, job: TrainJob, processes: int) -> Meeting:
        """Let each begin, with so many processes, and return at once; where this node's launcher meets theirs."""

    def ended(self) -> bool:
        """Whether this node's processes are to end, because a failure elsewhere has not ended them."""

    def ends(self) -> list[End]:
        """How the start ended where it failed, once it ended on all. Raises NodeLost, and what a node could not do."""

    def store(self, done: int) -> "Storing":
        """Let each store its files of a checkpoint, and return at once."""


class Storing(Protocol):
    """Other nodes that store their files of one checkpoint."""

    def done(self, seconds: float) -> bool | None:
        """Whether all of them are stored, or some never will be; None where that is not known in so many seconds."""


# The nodes that train a stage with this process's.
other_nodes: ContextVar[Others | None] = ContextVar("other_nodes", default=None)


def nodes_for(stage: Stage, nodes: int, devices: int) -> int:
    """On how many of so many nodes a stage trains: the most whose processes, one a device, its batch divides among."""
    fitting = (count for count in range(1, nodes + 1) if stage.divides_among(count * max(devices, 1)))
    return max(fitting, default=1)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
