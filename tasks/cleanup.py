"""Cleans up object storage, each task for as long as a maintenance task may take; the next turn goes on.

`collect` deletes dead objects from the store and then forgets them. `reconcile` compares store and table in the order
of their keys: it condemns uploads that nobody has committed, which makes them dead, and reports committed objects that
are missing.

Nothing is deleted that a commit refers to:
- Only dead objects are deleted. A dead one has no batches left, and what is dead stays so (db/objects.py).
- An upload without a row may be committed at any moment. So it is never deleted at once, but condemned: either its
  commit or its condemnation has the key, and whoever comes second is told. A commit that is refused was not
  acknowledged.
- What is younger than `object_ttl_seconds`, by the store's own clock, is left alone. It is the time that a broker has
  from an upload to its commit. One that comes even later is refused for as long as the condemned row stays, which is
  `object_grace_seconds` more.
- A store that holds none of the committed objects is not this log's, or not all of it: nothing is condemned there.

Nothing stays for ever: what is in the store is committed, and dead at some time, or it has no row, and is condemned.

What a crash leaves behind, or a store that fails:
- After objects were taken, some or all of them deleted: their rows. The next round takes them again, and to delete
  what is gone is no error. Where the store fails and not the worker, they are given back, and the next turn takes
  them.
- After uploads were condemned: dead objects, for collect. After a part was compared and before its position was saved:
  the next turn compares it again, and finds condemned what it condemned.
- An upload that ends after its key was condemned and deleted has no row, and is condemned again later.

Several workers: each collector takes objects of its own. Of two that reconcile at once both do the same, and one
position counts. A collector that stood still since it took objects deletes them late, which is why a key is never used
twice.

Objects that are committed while the store is listed may be missing in the list, and those that collect deletes
meanwhile may be missing in the store. So before a committed object is reported it is looked for by its key, and then
it must still be the same one and not dead: it was so all the while, and its upload had ended before it was committed.
"""

import heapq
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from operator import attrgetter
from time import monotonic
from typing import Any, Concatenate, ParamSpec, TypeVar

from config.errors import StoreError
from db.objects import (
    KEY_BYTES,
    KnownObject,
    condemn,
    find_live_objects,
    find_objects,
    forget_dead_objects,
    give_back_dead_objects,
    read_reconciliation,
    save_reconciliation,
    take_dead_objects,
)
from db.statements import Connection
from db.translate import is_storable, is_transient, would_meet_all
from tasks.app import TidemarkApp
from tasks.retries import with_retries
from tasks.store import Store, Upload, open_store

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")

# Objects that are taken, or compared, at a time: what S3 lists and deletes in one request.
_PAGE = 1_000
# Keys that a turn names in its log, and in its result.
_LOGGED = 100
_SHOWN = 3

# What lies under a key, and what the table says of it.
_Pair = tuple[Upload | None, KnownObject | None]


def store_of(app: TidemarkApp) -> Store:
    """The app's store; for `app.once`."""
    return open_store(app.settings)


def collect(app: TidemarkApp) -> dict[str, int]:
    """Delete objects that have been dead for the grace time; returns how many, and of how many the store failed to."""
    store, grace = app.once(store_of), app.settings.object_grace_seconds
    ask = _Database(app)
    deleted, left = 0, dict[str, str]()
    failed, is_first = 0, True
    while is_first or not ask.is_over():
        dead = ask(take_dead_objects, limit=_PAGE, older_than_seconds=grace, new_round=is_first)
        if not dead:
            break
        try:
            kept = store.delete([o.key for o in dead])
        except StoreError:
            ask(give_back_dead_objects, dead)
            raise
        deleted += ask(forget_dead_objects, [o.id for o in dead if o.key not in kept])
        failed, left, is_first = failed + len(kept), left or kept, False
    for key, reason in islice(left.items(), 1):
        log.error("uploads cannot be deleted", extra={"uploads": failed, "key": key, "error": reason})
    return {"deleted": deleted, "failed": failed}


def reconcile(app: TidemarkApp) -> dict[str, Any]:
    """Compare the next part of store and table; returns what was found, as the fields of `Found`."""
    store, ask = app.once(store_of), _Database(app)
    begun = ask(read_reconciliation)
    key, found = begun.key, Found()
    found_key = begun.found_key
    if found_key is not None and not (ask(find_live_objects, [found_key]) and store.existing([found_key])):
        found_key = None
    pairs = _pairs(_uploads(store, key), _objects(ask, key))
    try:
        while not found.complete:
            page = list(islice(pairs, _PAGE))
            met = [known.key for upload, known in page if upload is not None and known is not None and known.is_live]
            found_key = met[-1] if met else found_key
            found.compared += sum(upload is not None for upload, _ in page)
            unknown = [upload for upload, known in page if upload is not None and known is None]
            old = [upload.key for upload in unknown if upload.age > app.settings.object_ttl_seconds]
            found.young += len(unknown) - len(old)
            if found_key is None:
                found.unconfirmed += len(old)
            else:
                _condemn(ask, found, old)
            _report_missing(ask, found, store, page)
            # The next round begins with the first key.
            found.complete = len(page) < _PAGE
            key = "" if found.complete else _key(page[-1])
            if ask.is_over():
                break
    finally:
        # Also where the store failed on the way: what was compared is done.
        ask(save_reconciliation, begun, key, found_key)
    if found.unconfirmed:
        log.warning(
            "none of the committed objects was found in the store: its unknown uploads are left alone",
            extra={"uploads": found.unconfirmed, "complete": found.complete},
        )
    return asdict(found)


@dataclass(kw_only=True, slots=True)
class Found:
    """What a turn of `reconcile` found: uploads that it compared; those that it condemned, or left alone because they
    are young (`young`), or because no committed object was seen in the store (`unconfirmed`), or for the next round
    (`left`); committed objects that are `missing`, and the `first` of them. `complete` at the end of a round.
    """

    compared: int = 0
    condemned: int = 0
    young: int = 0
    unconfirmed: int = 0
    left: int = 0
    missing: int = 0
    first: list[str] = field(default_factory=list)
    complete: bool = False


class _Database:
    """Asks the database, again where it may help, until the turn is over."""

    def __init__(self, app: TidemarkApp) -> None:
        self._app = app
        self._until = monotonic() + app.settings.maintenance_seconds

    def is_over(self) -> bool:
        return monotonic() >= self._until

    def __call__(
        self,
        function: Callable[Concatenate[Connection, _Arguments], _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        def once() -> _Result:
            with self._app.database.connection() as conn:
                return function(conn, *args, **kwargs)

        return with_retries(
            self._app.settings,
            once,
            until=self._until,
            retry=lambda error: is_transient(error) and would_meet_all(error),
        )


def _pairs(uploads: Iterator[Upload], objects: Iterator[KnownObject]) -> Iterator[_Pair]:
    by_key = attrgetter("key")
    sides: Iterator[Upload | KnownObject] = heapq.merge(uploads, objects, key=by_key)
    for _, group in groupby(sides, key=by_key):
        upload = known = None
        for one in group:
            if isinstance(one, Upload):
                upload = one
            else:
                known = one
        yield upload, known


def _key(pair: _Pair) -> str:
    return next(one.key for one in pair if one is not None)


def _uploads(store: Store, after: str) -> Iterator[Upload]:
    """What a commit could refer to. Under other keys lies nothing of ours."""
    strange = 0
    for upload in store.walk(after):
        if is_storable(upload.key) and len(upload.key.encode()) <= KEY_BYTES:
            yield upload
            continue
        strange += 1
        if strange == 1:
            log.warning("the store holds what no commit can name; delete it yourself", extra={"key": ascii(upload.key)})


def _objects(ask: _Database, after: str) -> Iterator[KnownObject]:
    while page := ask(find_objects, after_key=after, limit=_PAGE):
        yield from page
        after = page[-1].key


def _condemn(ask: _Database, found: Found, keys: Sequence[str]) -> None:
    """Condemn them; halved where that fails, until the key that somebody is committing is alone."""
    if not keys:
        return
    try:
        found.condemned += len(ask(condemn, keys))
    except Exception as error:
        if would_meet_all(error):
            raise
        if len(keys) == 1 or ask.is_over():
            found.left += len(keys)
            said = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("not condemned in this round", extra={"uploads": len(keys), "key": keys[0], "error": said})
            return
        half = len(keys) // 2
        _condemn(ask, found, keys[:half])
        _condemn(ask, found, keys[half:])


def _report_missing(ask: _Database, found: Found, store: Store, page: Sequence[_Pair]) -> None:
    unlisted = {known.key: known for upload, known in page if upload is None and known is not None and known.is_live}
    absent = unlisted.keys() - store.existing(list(unlisted))
    live = {known.id for known in ask(find_live_objects, sorted(absent))} if absent else set()
    for key in sorted(absent):
        if unlisted[key].id not in live:
            continue
        found.missing += 1
        if found.missing <= _LOGGED:
            log.error("a committed object is missing in the store", extra={"key": key, "object_id": unlisted[key].id})
        if len(found.first) < _SHOWN:
            found.first.append(key)
