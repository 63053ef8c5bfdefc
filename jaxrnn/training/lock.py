"""A lock on a directory, for one writer at a time; the system releases it when a process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

NAME = ".jaxrnn-run.lock"


class Held(Exception):
    """The lock is already held; the text says by whom."""


class Lock:
    """A lock on `directory`, held until `close`; raises `Held` if it is already held.

    The file of the lock stays, and is empty then.
    """

    def __init__(self, directory: Path):
        self.path = directory / NAME
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _try_lock(self.file)
        except BlockingIOError:
            holder = os.read(self.file, 1000).decode(errors="replace") or "another process"
            os.close(self.file)
            raise Held(holder) from None
        except BaseException:
            os.close(self.file)
            raise
        os.truncate(self.file, 0)
        os.write(self.file, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def lost(self) -> bool:
        """Whether the file is no longer there, because the directory was deleted or replaced."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.file))
        except FileNotFoundError:
            return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.truncate(self.file, 0)
            _unlock(self.file)  # a forked child may still hold the file
        os.close(self.file)


if sys.platform == "win32":
    import msvcrt

    BYTE = 1 << 30
    """The byte that is locked, behind the text, which others must be able to read."""

    def _try_lock(file: int) -> None:
        os.lseek(file, BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(file, 0, os.SEEK_SET)

    def _unlock(file: int) -> None:
        os.lseek(file, BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
