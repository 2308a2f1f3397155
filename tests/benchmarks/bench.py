"""What measurements run on: a server for all of them, and for each part what it asked for."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg

from tests.benchmarks.crew import Crew
from tests.benchmarks.server import running_server

_Kept = TypeVar("_Kept")


class Bench:
    """Nothing starts before it is asked for, so that plans are made without a server."""

    def __init__(self) -> None:
        self._run = ExitStack()
        self._part = ExitStack()
        self._kept: dict[Hashable, Any] = {}

    @cached_property
    def url(self) -> str:
        return self._run.enter_context(running_server())

    @cached_property
    def conn(self) -> psycopg.Connection[Any]:
        return self._run.enter_context(psycopg.connect(self.url, autocommit=True))

    def crew(self, size: int) -> Crew:
        """The part's crew of this size."""
        return self.keep(("crew", size), lambda: Crew(self.url, size))

    def keep(self, key: Hashable, make: Callable[[], AbstractContextManager[_Kept]]) -> _Kept:
        """What `make()` gives, made at the first call with this key and closed at the end of the part."""
        if key not in self._kept:
            self._kept[key] = self._part.enter_context(make())
        kept: _Kept = self._kept[key]
        return kept

    @contextmanager
    def part(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._kept.clear()
            self._part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._run:
            self._part.close()
