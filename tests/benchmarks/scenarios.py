"""The seed system's own scenarios."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """`batch` is how many events the seed takes a transaction."""

    name: str
    topics: int
    partitions: int
    events: int
    records: tuple[int, int]
    batch: int
    workers: int = 1
    existing: bool = False

    @property
    def all_partitions(self) -> int:
        return self.topics * self.partitions

    @property
    def is_short(self) -> bool:
        """Whether it takes milliseconds."""
        return self.events <= 5_000

    @property
    def rehearsed(self) -> int:
        """Events for a run to warm up."""
        return min(self.events // 5, 1_000)


def _scenario(name: str, shape: tuple[int, int, int], records: tuple[int, int], batch: int, workers: int) -> Scenario:
    topics, partitions, events = shape
    return Scenario(
        name=name,
        topics=topics,
        partitions=partitions,
        events=events,
        records=records,
        batch=batch,
        workers=workers,
        existing=name == "ExistingOffsets",
    )


SCENARIOS = (
    _scenario("Small", (2, 2, 100), (1, 100), 50, 1),
    _scenario("Medium", (5, 4, 1_000), (100, 1_000), 500, 1),
    _scenario("Large", (10, 8, 5_000), (500, 5_000), 2_000, 1),
    _scenario("HighContention", (3, 2, 2_000), (1, 10), 1_000, 1),
    _scenario("ExistingOffsets", (3, 4, 500), (100, 1_000), 250, 1),
    _scenario("MultiPartition", (5, 16, 2_000), (50, 500), 1_000, 1),
    _scenario("WindowFunctionStress", (2, 4, 5_000), (1, 5), 2_500, 1),
    *(_scenario(f"BatchSize{batch}", (5, 4, 1_000), (100, 1_000), batch, 1) for batch in (100, 500, 1_000, 2_000)),
    *(_scenario(f"Concurrent{workers}", (5, 4, 50_000), (100, 1_000), 500, workers) for workers in (2, 4)),
    _scenario("Concurrent8", (10, 8, 50_000), (500, 5_000), 2_000, 8),
    _scenario("HighContentionConcurrent", (3, 2, 50_000), (1, 10), 500, 4),
    _scenario("MultiPartitionConcurrent", (5, 16, 50_000), (50, 500), 500, 6),
)
