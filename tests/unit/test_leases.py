"""Who has which shard: the same for everybody, in fair shares, and little moves."""

import pytest

from tasks.leases import assign


def counts(owners: dict[int, str]) -> dict[str, int]:
    return {member: list(owners.values()).count(member) for member in set(owners.values())}


@pytest.mark.parametrize("shards", [1, 3, 8, 64])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 9])
def test_every_shard_has_one_owner_and_shares_differ_by_one(shards: int, workers: int) -> None:
    owners = assign(shards, {f"w{n}": 1 for n in range(workers)})
    assert sorted(owners) == list(range(shards))
    sizes = [counts(owners).get(f"w{n}", 0) for n in range(workers)]
    assert max(sizes) - min(sizes) <= 1


def test_a_worker_of_several_slots_gets_its_share() -> None:
    assert counts(assign(12, {"a": 1, "b": 3, "c": 2})) == {"a": 2, "b": 6, "c": 4}


@pytest.mark.parametrize("workers", range(1, 9))
def test_a_join_and_a_leave_move_little_more_than_a_share(workers: int) -> None:
    """At most twice the shards that must move; by turns (shard modulo workers) nearly all would."""
    shards = 64
    before = {f"worker-{n}": 1 for n in range(workers)}
    after = {**before, "joined": 1}
    old, new = assign(shards, before), assign(shards, after)
    moved = sum(old[shard] != new[shard] for shard in range(shards))
    assert shards // (workers + 1) <= moved <= 2 * (shards // (workers + 1) + 1)
