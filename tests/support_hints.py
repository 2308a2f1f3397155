"""The hints for pg_hint_plan in front of the statements, taken apart."""

import re

from db.statements import statements

# The statements that run all the time and that statistics can talk into another plan. Those inside of functions hold
# theirs at default settings: see test_plans.
HINTED = [
    "delete_expired",
    "find_committed",
    "find_pending",
    "lock_free_partitions",
    "lock_partitions",
    "place_incremental",
    "place_window",
]

# All but those of one row, and those that are short by themselves: each scan of one of these has a hint.
GROWING = {"deleted_batches", "log_starts", "objects", "passes", "record_batch_events", "runs", "topic_partitions"}


def with_a_hint() -> list[str]:
    """Names of the statements that have one anywhere."""
    return sorted(name for name, text in statements().items() if b"/*+" in text)


def split(name: str) -> tuple[str, str]:
    """The hint of a statement, without its comment's signs, and the statement."""
    match = re.match(r"/\*\+(.*?)\*/\n(.*)", statements()[name].decode(), re.DOTALL)
    assert match, f"{name} does not begin with a hint"
    return match[1], match[2]


def phrases(name: str) -> list[tuple[str, list[str]]]:
    """Each phrase of a hint: its keyword, and the words in its parentheses."""
    hint, _ = split(name)
    # Keywords begin with a capital letter, names have none.
    found = re.findall(r"([A-Z]\w+)\(([^A-Z]+)\)", hint)
    return [(keyword, re.findall(r"\w+", words)) for keyword, words in found]


def scans(name: str) -> dict[str, str | None]:
    """By alias: the index that a hint names, None for a scan by row identifiers."""
    found: dict[str, str | None] = {}
    for keyword, words in phrases(name):
        if keyword in {"IndexScan", "IndexOnlyScan"}:
            found[words[0]] = words[1]
        elif keyword == "TidScan":
            found[words[0]] = None
    return found
