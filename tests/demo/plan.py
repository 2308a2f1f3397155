"""What a run of the demo does, and where it keeps its files."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

TOPICS = ("orders", "payments", "clicks")
PARTITIONS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Options of one run. `name` tells its topics, objects and workers from those of other runs on shared servers."""

    seconds: float
    producers: int
    rate: float
    workers: int
    shards: int
    keep: bool
    database_url: str | None
    broker_url: str | None
    name: str = field(default_factory=lambda: secrets.token_hex(3))

    @property
    def topics(self) -> list[str]:
        """Plain names in a database of our own; elsewhere somebody may have such topics."""
        return list(TOPICS) if self.database_url is None else [f"demo-{self.name}-{topic}" for topic in TOPICS]

    @property
    def key_prefix(self) -> str:
        return f"demo-{self.name}/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The run's directory, which goes with it."""

    directory: Path

    @property
    def objects(self) -> Path:
        return self.directory / "objects"

    @property
    def ledgers(self) -> Path:
        return self.directory / "ledgers"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def scratch(self) -> Path:
        return self.directory / "tmp"

    @classmethod
    @contextmanager
    def temporary(cls) -> Iterator[Self]:
        """A fresh directory; root's servers run as `nobody`, who must be able to pass through it."""
        directory = Path(tempfile.mkdtemp(prefix="tidemark-demo-"))
        try:
            if os.geteuid() == 0:
                directory.chmod(0o711)
            places = cls(directory=directory)
            for part in (places.objects, places.ledgers, places.logs, places.scratch):
                part.mkdir(0o700)
            yield places
        finally:
            shutil.rmtree(directory)
