"""What a task is: problems, the prompt that each becomes, and the reward of an answer.

A task is any object with

    train, validation, test                 sequences of Problem
    encode(problem, tokenizer)              the token ids of the prompt
    reward(problem, response, finished)     +1.0 for a right answer, -1.0 for any other
    rewards(problems, responses, finished)  the same for all answers of a step

and, if grading can be stopped, `timeouts`: how many answers that happened to.
`load_task` makes one by name, or from a file of yours (own.py), which needs no `test` and no
`rewards`. Read countdown.py first; mathematics.py is the task of the paper.
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


def load_task(
    name: str, data: str = "", test_data: str = "", template: str = "dapo", date: str = ""
):
    """The task called `name`, or the class that FILE:CLASS names. The other arguments are for math;
    date is the day that its prompts may tell, such as 2026-11-26 (by default today). ValueError or
    FileNotFoundError."""
    # Imported here, because no task needs anything of another.
    if name == "math":
        from tasks.mathematics import Math

        return Math(data, test_data, template, date)

    in_a_file = ":" in name
    if name not in COUNTDOWN_TASKS and not in_a_file:
        known = ", ".join(COUNTDOWN_TASKS)
        raise ValueError(
            f"unknown task {name!r}; the tasks are {known}, which bring their problems, math, and "
            "FILE:CLASS"
        )
    if data or test_data:
        raise ValueError(f"--data and --test-data go with --task math; {name} brings its problems")
    if in_a_file:
        from tasks.own import load_own_task

        return load_own_task(name)

    from tasks.countdown import Countdown

    least_solutions, most_solutions = COUNTDOWN_TASKS[name]
    return Countdown(least_solutions, most_solutions)
