"""Every error Tidemark raises on purpose.

A message names the object, what is wrong with it and what to do. `code` is the SQLSTATE the SQL functions
raise for the same condition, so that a broker in any language meets the same set; class TM is ours (Postgres
leaves classes that start with I to Z to its users, https://www.postgresql.org/docs/current/errcodes-appendix.html).
"""

from typing import ClassVar


class TidemarkError(Exception):
    """Base of all: catch this to tell Tidemark's own errors from everything else."""

    code: ClassVar[str | None] = None

    def __init_subclass__(cls, code: str | None = None) -> None:
        cls.code = code


class SettingsError(TidemarkError):
    """A `TIDEMARK_…` variable is missing or holds what it must not."""


class EmbeddedServerError(TidemarkError):
    """An embedded Postgres or Redis could not be started, or went away."""


class InvalidCommitError(TidemarkError, code="TM001"):
    """The arguments of a commit are malformed; nothing was written."""


class CommitConflictError(TidemarkError, code="TM002"):
    """The object key is committed already, with other content."""


class UnknownPartitionError(TidemarkError, code="TM003"):
    """No partition has this id."""


class UnknownTopicError(TidemarkError, code="TM004"):
    """No topic has this name."""


class InvalidTopicError(TidemarkError, code="TM005"):
    """A topic name or partition count breaks the rules for them."""


class TopicExistsError(TidemarkError, code="TM006"):
    """A topic has this name already."""


class OffsetOutOfRangeError(TidemarkError, code="TM007"):
    """The offset lies below the partition's start offset or above its end offset."""


class ForeignClusterError(TidemarkError, code="TM008"):
    """The database was restored into another cluster, whose transaction ids mean nothing to the cursors."""


class InvalidFetchError(TidemarkError, code="TM009"):
    """A fetch limit is not positive."""


class CommitTooLargeError(TidemarkError, code="TM010"):
    """A commit brings more batches than one call may; nothing was written."""


class OffsetNotAvailableError(TidemarkError, code="TM011"):
    """A standby was asked for an offset that has not arrived there; the next attempt may succeed."""


class CondemnedObjectError(TidemarkError, code="TM012"):
    """The object key was condemned before it was committed: what was uploaded under it is deleted."""


class UnknownProducerError(TidemarkError, code="TM013"):
    """No producer has this id, or it was silent for so long that it expired."""


class FencedProducerError(TidemarkError, code="TM014"):
    """The producer goes on under a newer epoch, in another program."""


class StoreError(TidemarkError):
    """The object store did not do what it was asked for; nothing is forgotten, and the next turn asks again."""


class PartitionNotEmptyError(TidemarkError, code="TM015"):
    """The partition has had batches with offsets, so nobody can choose any more where it begins."""


class SchemaVersionError(TidemarkError):
    """The database's schema is not the one this program needs."""


class TransientDatabaseError(TidemarkError):
    """A deadlock, a time-out or a lost connection outlasted the retries; the next attempt may succeed."""


class InvalidJobError(TidemarkError):
    """The arguments of a task are not what it takes."""


class InvalidMessageError(TidemarkError):
    """A message in a queue is none that Tidemark publishes; it is counted by its `reason`."""

    def __init__(self, reason: str, fault: str) -> None:
        super().__init__(reason, fault)
        self.reason = reason

    def __str__(self) -> str:
        return f"the message is not taken: {self.args[1]}"


class SeedError(TidemarkError):
    """The tables of the seed's system are not what can be adopted; nothing was written."""


class SeedChangedError(SeedError):
    """The seed's system has written since its adoption began, so what was copied is not what it holds."""


class AdoptConflictError(TidemarkError):
    """What is to be adopted is there already, and was not adopted from the seed's system."""


class AdoptDifferenceError(TidemarkError):
    """What was copied differs from the seed's rows; no topic was created."""
