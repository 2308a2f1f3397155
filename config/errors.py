"""Every error Tidemark raises on purpose.

A message names the object, what is wrong with it and what to do. `code` is the SQLSTATE the SQL functions
raise for the same condition, so that a broker in any language meets the same set; class TM is ours (Postgres
leaves classes that start with I to Z to its users, https://www.postgresql.org/docs/current/errcodes-appendix.html).
"""

from typing import ClassVar


class TidemarkError(Exception):
    """Base of all: catch this to tell Tidemark's own errors from everything else."""

    code: ClassVar[str | None] = None


class SettingsError(TidemarkError):
    """A `TIDEMARK_…` variable is missing or holds what it must not."""


class EmbeddedServerError(TidemarkError):
    """An embedded Postgres or Redis could not be started, or went away."""


class InvalidCommitError(TidemarkError):
    """The arguments of a commit are malformed; nothing was written."""

    code = "TM001"


class CommitConflictError(TidemarkError):
    """The object key is committed already, with other content."""

    code = "TM002"


class UnknownPartitionError(TidemarkError):
    """No partition has this id."""

    code = "TM003"


class UnknownTopicError(TidemarkError):
    """No topic has this name."""

    code = "TM004"


class InvalidTopicError(TidemarkError):
    """A topic name or partition count breaks the rules for them."""

    code = "TM005"


class TopicExistsError(TidemarkError):
    """A topic has this name already."""

    code = "TM006"


class OffsetOutOfRangeError(TidemarkError):
    """The offset lies below the partition's start offset or above its end offset."""

    code = "TM007"


class ForeignClusterError(TidemarkError):
    """The database was restored into another cluster, whose transaction ids mean nothing to the cursors."""

    code = "TM008"


class InvalidFetchError(TidemarkError):
    """A fetch limit is not positive."""

    code = "TM009"


class CommitTooLargeError(TidemarkError):
    """A commit brings more batches than one call may; nothing was written."""

    code = "TM010"


class OffsetNotAvailableError(TidemarkError):
    """A standby was asked for an offset that has not arrived there; the next attempt may succeed."""

    code = "TM011"


class SchemaVersionError(TidemarkError):
    """The database's schema is not the one this program needs."""


class TransientDatabaseError(TidemarkError):
    """A deadlock, a time-out or a lost connection outlasted the retries; the next attempt may succeed."""


class InvalidJobError(TidemarkError):
    """The arguments of a task are not what it takes."""
