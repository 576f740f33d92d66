"""Work shared among processes: what they make of their shares, and how their ends are told."""

import os
import resource
from pathlib import Path

import pytest
import torch
from shares import die, process_of, refuse, total

from tasks.running.devices import dealt, gathered, on_devices, shared
from tasks.settings import ServiceError, is_transient


@pytest.mark.parametrize("items", range(8))
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_dealt_items_are_gathered_in_their_first_order_and_no_share_is_empty(items: int, count: int) -> None:
    shares = dealt(range(items), count)
    assert len(shares) == min(items, count) and all(shares)
    assert gathered(shares) == list(range(items))


def test_one_share_is_made_here_and_each_of_several_in_a_process_of_its_own_that_keeps_it() -> None:
    assert on_devices(process_of, [7]) == [(7, os.getpid())]
    with shared(process_of, [7, 8]) as everywhere:
        made = everywhere.ask(tuple)
        assert [share for share, _ in made] == [7, 8]
        assert len({os.getpid(), *(process for _, process in made)}) == 3
        assert everywhere.ask(tuple) == made
        with pytest.raises(ServiceError, match="ended too early") as error:
            everywhere.ask(die)
        assert is_transient(error.value)
    assert not [process for _, process in made if Path(f"/proc/{process}").exists()]


@pytest.mark.parametrize("shares", [[1], [1, 1]])
def test_what_a_share_raises_is_raised_here(shares: list[int]) -> None:
    with pytest.raises(ValueError, match="share 1 is refused"):
        on_devices(refuse, shares)


def test_any_number_of_tensors_goes_to_a_process_and_no_file_stays_open_for_them() -> None:
    tensors = [torch.full((3,), number) for number in range(300)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with shared(process_of, [7, 8]) as everywhere:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, before[1]))
        try:
            totals = everywhere.ask(total, tensors)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert totals == [3 * sum(range(300))] * 2
