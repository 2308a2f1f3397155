"""Names of partitions, as people read them in Flower."""

from tasks.names import PartitionNames


def names(known: dict[int, tuple[str, int]]) -> PartitionNames:
    made = PartitionNames()
    made._known.update(known)
    return made


def test_partitions_of_a_topic_are_put_together_in_ranges() -> None:
    known = {i: ("orders", i - 10) for i in range(10, 26)} | {40: ("payments", 3)}

    assert names(known).describe(list(range(10, 26))) == "orders/0-15"
    assert names(known).describe([40, 10, 11, 13]) == "orders/0-1,3 payments/3"


def test_an_unknown_partition_appears_by_its_id() -> None:
    assert names({}).describe([7, 8]) == "id/7-8"


def test_a_long_list_is_cut_with_a_sign_that_it_was() -> None:
    known = {i: (f"topic-{i}", 0) for i in range(100)}

    text = names(known).describe(list(range(100)), width=60)

    assert len(text) == 60
    assert text.endswith("…")


def test_the_topic_of_a_partition_is_known_or_none() -> None:
    known = names({1: ("b", 0), 2: ("a", 0), 3: ("b", 1)})
    assert [known.topic(i) for i in (1, 2, 3, 4)] == ["b", "a", "b", None]
