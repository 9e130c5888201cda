"""One process at a time: a lock that the kernel releases when its holder dies, however it dies.

The lock of OUT/NAME is the file OUT/.NAME.work/lock: beside what it guards, because that may be
replaced as a whole. It says who holds it. Processes that the holder starts do not inherit it, as
Python closes its files in them."""

import fcntl
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, TextIO


def workplace(path: Path) -> Path:
    """The folder beside `path` for the lock, and for what is not yet or no longer in its place.
    However `path` is spelled, it is the same."""
    path = path.resolve()
    return path.with_name(f".{path.name}.work")


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """`with lock(path)`: no other process is in such a block. BlockingIOError says who is.

    The end leaves no trace, not even the folders that had to be made for the lock."""
    place = workplace(path)
    file = place / "lock"
    made = [folder for folder in place.parents if not folder.exists()]
    held = take(file, path)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held, so nobody holds what is removed
        held.close()
        remove_empty([place, *made])


def take(file: Path, path: Path) -> TextIO:
    """The open lock file, which is held until it is closed."""
    held = None
    while held is None:
        held = open_file(file)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            holder = held.read() or "another process"
            held.close()
            raise BlockingIOError(
                f"{path} is in use by {holder}; wait until it is through, or stop it"
            ) from None
        if not is_at(held, file):  # its last holder has just removed it
            held.close()
            held = None

    held.truncate(0)
    now = time.strftime("%Y-%m-%d %H:%M")
    held.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
    held.flush()
    return held


def open_file(file: Path) -> TextIO:
    """Makes the file and its folders. Another process may be just removing them: then again."""
    tries_left = 100
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return open(file, "a+")
        except (FileNotFoundError, FileExistsError):
            tries_left -= 1
            if tries_left == 0:
                raise
            time.sleep(0.001)


def is_at(opened: TextIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def remove_empty(folders: list[Path]) -> None:
    """Inner folders first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
