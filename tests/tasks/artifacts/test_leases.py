"""Laws of leases: of several hosts one has it, for as long as it lives, and then another one."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from objects import failing, stored

from tasks.artifacts import Store, leases
from tasks.artifacts.leases import Lease, check_workspace
from tasks.settings import ServiceError, Settings, is_transient

KEY = "shared/leases/distill-1"


@pytest.fixture(autouse=True)
def short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LIFE_SECONDS", 0.5)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)


def hosts(store: Store, count: int) -> list[Lease]:
    return [Lease(store, KEY, host=f"host-{number}") for number in range(count)]


def claims(contenders: list[Lease]) -> list[bool]:
    with ThreadPoolExecutor(len(contenders)) as pool:
        return [not holder for holder in pool.map(Lease.claim, contenders)]


def test_of_eight_hosts_one_has_it_and_the_others_are_told_who(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LIFE_SECONDS", 1e9)
    contenders = hosts(store, 8)
    won = claims(contenders)
    assert won.count(True) == 1
    name = leases.socket.gethostname()
    assert [lease.claim() for lease, mine in zip(contenders, won, strict=True) if not mine] == [name] * 7


def test_a_lease_that_is_kept_stays_and_one_that_ended_is_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LIFE_SECONDS", 10.0)  # of a machine that is busy with something else
    holder, other = hosts(store, 2)
    assert holder.claim() == ""
    with holder.kept():
        while holder._beats < 20:
            assert other.claim()
    assert other.claim() == ""


def test_the_lease_of_a_dead_host_goes_to_one_of_those_that_wait(store: Store) -> None:
    dead, *waiting = hosts(store, 5)
    assert dead.claim() == ""
    won: list[bool] = []
    while not any(won):
        won = claims(waiting)
        time.sleep(0.05)
    assert won.count(True) == 1
    assert not dead._renew(), "it woke up, and is told"


def test_a_host_takes_its_own_lease_back_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LIFE_SECONDS", 1e9)
    killed, restarted = hosts(store, 1)[0], hosts(store, 1)[0]
    assert killed.claim() == restarted.claim() == ""


def test_while_the_store_is_away_no_lease_expires(store: Store) -> None:
    holder, other = hosts(store, 2)
    assert holder.claim() == "" and other.claim()
    with failing(store, "GetObject", 1), pytest.raises(ConnectionResetError):
        other.claim()
    time.sleep(leases.LIFE_SECONDS)
    assert other.claim(), "it had no time to write since"


def test_an_answer_that_was_lost_is_no_other_host(store: Store) -> None:
    (holder,) = hosts(store, 1)
    assert holder.claim() == ""
    holder._etag = '"of the answer before"'
    assert holder._renew()
    with holder.kept():
        pass
    assert KEY not in stored(store)


@pytest.fixture
def shared(settings: Settings) -> Settings:
    return replace(settings, workspace=f"s3://{settings.bucket}/shared")


def test_a_store_that_can_hold_leases_is_left_as_it_was(store: Store, shared: Settings) -> None:
    check_workspace(shared)
    assert not stored(store)


@pytest.fixture
def heedless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client of a server that does not look at If-Match."""
    opened = leases.open_store

    def open_heedless(settings: Settings, attempts: int) -> Store:
        store = opened(settings, attempts=attempts)

        def forget(params: dict[str, object], **_: object) -> None:
            params.pop("IfMatch", None)

        store.client.meta.events.register("provide-client-params.s3.PutObject", forget)
        return store

    monkeypatch.setattr(leases, "open_store", open_heedless)
    yield


def test_a_store_that_ignores_conditions_is_refused(store: Store, shared: Settings, heedless: None) -> None:
    with pytest.raises(ServiceError, match=r"s3://test-.*/shared at .*: this server ignores .*; use another"):
        check_workspace(shared)


def test_a_wrong_or_a_dead_store_is_one_clear_line(shared: Settings) -> None:
    with pytest.raises(ServiceError, match=r"^s3://no-such-bucket/x at .*: the bucket does not exist; create it"):
        check_workspace(replace(shared, workspace="s3://no-such-bucket/x"))
    with pytest.raises(ServiceError, match=r"cannot reach S3") as dead:
        check_workspace(replace(shared, endpoint_url="http://127.0.0.1:9"))
    assert is_transient(dead.value) and "\n" not in str(dead.value)
