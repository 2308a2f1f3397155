"""Advisory file locks that survive no one: the kernel drops them with the last process that has them open."""

import fcntl
import os
import time
from pathlib import Path

_POLL = 0.02


class FileLock:
    """One `flock` on one file.

    The file itself is never removed: a process could lock the removed one while another locks its successor.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path = path
        self._mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def try_acquire(self) -> bool:
        """Take the lock, or return False when someone else's stands in the way."""
        if self._fd is not None:
            return True
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, self._mode | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def acquire(self, deadline: float) -> bool:
        """Take the lock before `deadline` (of `time.monotonic`).

        Polls, because a blocking `flock` knows no time-out.
        """
        while not self.try_acquire():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL)
        return True

    def release(self) -> None:
        """Give the lock up, for children that were forked while it was held as well."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.leave()

    def leave(self) -> None:
        """Close our own copy; forked children that inherited the lock keep it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
