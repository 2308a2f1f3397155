"""The router: from a task's arguments to its queue."""

from typing import Any

import pytest

from config.errors import InvalidJobError
from config.queues import all_queues, route, shard_of, shard_of_queue, shard_queue


def queue_for(name: str, *args: Any, **kwargs: Any) -> str | None:
    # Celery passes positional arguments, keyword arguments, options, and the task by keyword.
    found = route(8, name, args, kwargs, {}, task=None)
    return None if found is None else found["queue"]


@pytest.mark.parametrize("partition_id", [1, 7, 8, 9, 2**31 - 1])
def test_a_partition_goes_to_its_shard_however_the_arguments_are_passed(partition_id: int) -> None:
    expected = f"materialize.{partition_id % 8}"

    assert expected == queue_for("tasks.materialize", [partition_id])
    assert expected == queue_for("tasks.materialize", partition_ids=[partition_id])
    assert expected == queue_for("tasks.materialize", partition_ids=(partition_id, partition_id % 8 or 8))


@pytest.mark.parametrize("ids", [[], None, [0], [-1], [2**31], ["3"], [True], [1.0], 3, "12", {"a": 1}])
def test_what_is_no_list_of_ids_is_refused_with_the_way_out(ids: Any) -> None:
    with pytest.raises(InvalidJobError, match="materialize_topic"):
        queue_for("tasks.materialize", partition_ids=ids)


def test_a_task_serves_one_shard() -> None:
    with pytest.raises(InvalidJobError, match="2 shards"):
        queue_for("tasks.materialize", partition_ids=[1, 2])


def test_the_other_tasks_have_queues_of_their_own() -> None:
    assert queue_for("tasks.fan_out") == "control"
    assert queue_for("tasks.materialize_topic", "orders") == "control"
    assert {queue_for(f"tasks.{name}") for name in ("sweep", "retain", "audit", "collect", "reconcile")} == {
        "maintenance"
    }
    assert queue_for("celery.backend_cleanup") is None


def test_queue_names_and_shards_are_each_others_inverse() -> None:
    assert [shard_of_queue(queue) for queue in all_queues(3)] == [0, 1, 2, None, None]
    assert shard_queue(shard_of(11, 8)) == "materialize.3"
    assert shard_of_queue("materialize.x") is None
