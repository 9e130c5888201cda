"""Training runs in processes of their own, side by side, which end when their study does."""

import concurrent.futures
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence

from tqdm import tqdm


class Children:
    """The processes that are running, so that they end when the study does."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self, *command: str) -> None:
        """Runs `python COMMAND` to its end, in one thread. ChildProcessError, with its last line,
        if it fails."""
        if self.stopped:
            raise ChildProcessError("the study was stopped")
        process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.add(process)
        _, told = process.communicate()
        self.running.discard(process)
        if process.returncode != 0:
            last_line = told.strip().split("\n")[-1]
            raise ChildProcessError(f"{' '.join(command)} failed: {last_line}")

    def train(
        self, folder: Path, flags: Sequence[str], program: Sequence[str] = ("train.py",)
    ) -> None:
        """Begins the run in `folder`, or goes on with it (perhaps it is finished)."""
        if folder.exists():
            self.run(*program, "--resume", str(folder))
        else:
            self.run(*program, "--out", str(folder.parent), "--name", folder.name, *flags)

    def stop(self) -> None:
        """Asks all to end, as Ctrl-C does: a training run finishes its step and saves."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def side_by_side(
    work: Callable[[object, Children], None], jobs: Sequence, processes: int, label: str
) -> list[str]:
    """Calls work(job, children) for each job, `processes` at a time -> a sentence for each that
    failed. A run that diverges does not stop the others."""
    failures = []
    children = Children()
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(work, job, children) for job in jobs]
        finished = concurrent.futures.as_completed(futures)
        try:
            for future in tqdm(finished, total=len(futures), desc=label, unit="run"):
                error = future.exception()
                if error is not None and not isinstance(error, (ValueError, OSError)):
                    raise error
                if error is not None:
                    failures.append(str(error))
        except BaseException:  # Ctrl-C, SIGTERM, a bug: start none of the others
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return failures


@contextmanager
def study_in_a_sentence(name: str) -> Iterator[None]:
    """What ends the study `name` early is told in one sentence. SIGTERM does what Ctrl-C does:
    KeyboardInterrupt in the main thread."""

    def interrupt(number: int, frame) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped; the same command goes on")
