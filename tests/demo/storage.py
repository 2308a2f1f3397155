"""Object storage, played by a local directory. Every batch's bytes say whose they are."""

from collections.abc import Sequence
from pathlib import Path


def content(key: str, index: int, length: int) -> bytes:
    """The bytes of batch `index` of object `key`, whose name says producer and commit; no other batch has them."""
    label = f"{key} batch {index}\n".encode()
    return (label * (length // len(label) + 1))[:length]


def upload(directory: Path, key: str, lengths: Sequence[int]) -> None:
    """Write an object of that many batches, one behind the other."""
    path = directory / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(content(key, index, length) for index, length in enumerate(lengths)))


def download(directory: Path, key: str) -> bytes:
    """An object's bytes; none for one that was never uploaded."""
    try:
        return (directory / key).read_bytes()
    except FileNotFoundError:
        return b""
