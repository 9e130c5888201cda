"""How a run ends before its end: by a signal, or by what a user can mend, in one sentence."""

import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NoReturn

from plumbing.distributed import (
    OTHERS_ENDED,
    OthersEnded,
    is_first_process,
    is_first_to_speak,
    tells_of_others,
)
from plumbing.memory import out_of_memory


class Stop:
    """The handler of Ctrl-C and SIGTERM, and what the last sentence needs to know.

    A first signal lets the step in hand be finished and saved; a second one, or a first while
    nothing would be lost, stops at once."""

    asked = False
    in_steps = False  # a step is being computed, whose work would be lost
    run: Path | None = None
    saved = 0  # the step of the last save
    where = ""  # in the training, for the message about a number that is not finite

    def on_signal(self, number: int, frame) -> None:
        if self.asked or not self.in_steps:
            raise KeyboardInterrupt
        self.asked = True
        if is_first_process():
            # print is not safe in a signal handler.
            os.write(2, b"\nfinishing this step and saving; once more stops at once\n")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While all is saved, a first signal may stop the program at once."""
        before = self.in_steps
        self.in_steps = False
        yield
        self.in_steps = before

    @contextmanager
    def in_a_sentence(self) -> Iterator[None]:
        """Ends the program with a sentence and exit code 1, whatever happens in the block, unless it
        is a bug: that has a traceback. Of several processes the first to fail speaks."""
        try:
            yield
        except FloatingPointError as error:
            self.end(f"stopped in {self.where}: {error}; {self.what_may_help()}")
        except (ValueError, OSError, ImportError) as error:
            self.end(str(error))
        except OthersEnded as error:
            self.end_like_others(str(error))
        except KeyboardInterrupt:
            self.end(f"stopped{self.how_to_resume()}")
        except (MemoryError, RuntimeError) as error:
            if tells_of_others(error):
                self.end_like_others(OTHERS_ENDED)
            self.end(f"{out_of_memory(error)}{self.how_to_resume()}")

    def end_like_others(self, why: str) -> NoReturn:
        # After a signal, too, one process may be the first to stop.
        what = "stopped" if self.asked else why
        self.end(f"{what}{self.how_to_resume()}")

    def end(self, sentence: str) -> NoReturn:
        sys.exit(f"train.py: {sentence}" if is_first_to_speak() else 1)

    def how_to_resume(self) -> str:
        if self.run is None:
            return ""
        script = shlex.quote(sys.argv[0])
        run = shlex.quote(str(self.run))
        processes = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
        starter = f"torchrun --nproc-per-node {processes}" if processes else "python"
        return f"; go on from step {self.saved} with: {starter} {script} --resume {run}"

    def what_may_help(self) -> str:
        last = "nothing was saved yet"
        if self.saved:
            last = f"the last good state is of step {self.saved} (--model {self.run}/model)"
        return f"{last}; a new run with a lower --lr may help"


stop = Stop()
