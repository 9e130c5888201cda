"""What a task is: problems, the prompt that each becomes, and the reward of an answer.

A task is any object with

    train, validation, test                 sequences of Problem
    encode(problem, tokenizer)              the token ids of the prompt
    reward(problem, response, finished)     +1.0 for a right answer, -1.0 for any other
    rewards(problems, responses, finished)  the same for all answers of a step

and, if grading can be stopped, `timeouts`: how many answers that happened to.
`load_task` makes one by name. Read countdown.py first; mathematics.py is the task of the paper.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    prompt: str  # "7 7 1 8 -> 23 ?"
    answer: str  # what is known to be right: "23"


# The least and the most solutions of a problem. None is no limit.
COUNTDOWN_TASKS = {
    "countdown": (3, None),
    "countdown-easy": (12, None),
    "countdown-hard": (1, 2),
}


def load_task(name: str, data: str = "", test_data: str = "", template: str = "dapo"):
    """The task called `name`. The other arguments are for math. ValueError."""
    # Imported here, because neither task needs anything of the other.
    if name == "math":
        from tasks.mathematics import Math

        return Math(data, test_data, template)

    if name not in COUNTDOWN_TASKS:
        known = ", ".join(COUNTDOWN_TASKS)
        raise ValueError(
            f"unknown task {name!r}; the tasks are {known}, which bring their problems, and math"
        )
    if data or test_data:
        raise ValueError(f"--data and --test-data go with --task math; {name} brings its problems")

    from tasks.countdown import Countdown

    least_solutions, most_solutions = COUNTDOWN_TASKS[name]
    return Countdown(least_solutions, most_solutions)
