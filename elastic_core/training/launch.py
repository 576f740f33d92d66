"""torchrun, leaving in a file how its processes ended.

`python -m elastic_core.training.launch FILE [torchrun's arguments]`. FILE gets the exit codes of the processes that
failed, by rank; a negative one is the signal that killed the process. torchrun only prints them, and those of the
processes that it ended itself, by SIGTERM after another had failed, are not among them.
"""

import json
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from elastic_core.training.faults import LAUNCHER


def main(arguments: list[str]) -> int:
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        run(parse_args(arguments[1:]))
    except ChildFailedError as error:
        exits = Path(arguments[0])
        part = exits.with_name(f".{exits.name}")  # a full disk leaves a file empty
        part.write_text(json.dumps(of_their_own({rank: failed.exitcode for rank, failed in error.failures.items()})))
        part.replace(exits)
        return 1
    return 0


def of_their_own(exits: dict[int, int]) -> dict[int, int]:
    """Of exit codes in the order in which torchrun saw them, those that are not its own doing."""
    if next(iter(exits.values())) == -signal.SIGTERM:
        return exits
    return {rank: code for rank, code in exits.items() if code != -signal.SIGTERM}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
