"""Real mathematics: where the questions come from, and the words that are put around them. Read
after countdown.py, which has the same interface; math_grader.py says which answers are right.

Not called math.py: the grader's process is started in this folder, and would import it in place of
Python's own module.
"""

import csv
import datetime
import hashlib
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Sequence

from tasks import Problem
from tasks.grader_process import graders
from tasks.math_grader import LONGEST, final_answer, is_number, math_equal, open_questions

BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
QUESTION_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer")
TEMPLATES = {"qwen-math": BOXED, "chat": BOXED, "none": "{problem}", "dapo": DAPO}


def read_rows(data: str, split: str) -> Sequence:
    """The rows of a file, or of a hub data set (owner/name or owner/name:configuration). A row is a
    dict; a line of JSONL stays text, so that an error in it can be told with its number."""
    if not data:
        return []

    file = Path(data)
    if file.suffix == ".jsonl":
        return file.read_bytes().split(b"\n")
    if file.suffix == ".json":
        rows = json.loads(file.read_bytes())
        return rows["data"] if isinstance(rows, dict) else rows
    if file.suffix == ".csv":
        with open(file, encoding="utf-8-sig", newline="") as lines:
            return [without_empty_cells(row) for row in csv.DictReader(lines, strict=True)]

    from datasets import load_dataset  # here, because the other kinds do without it

    if ".parquet" in data:
        splits = load_dataset("parquet", data_files=data)
    else:
        splits = load_dataset(*data.split(":"))
    # Test sets too may have one split only, and call it `train`: AIME24 does.
    if split not in splits and len(splits) == 1:
        split = next(iter(splits))
    return splits[split]


def without_empty_cells(row: dict) -> dict:
    """A row of a csv file, where every cell is text and what is not known is an empty one."""
    return {column: cell for column, cell in row.items() if cell}


def read_problem(row: dict | bytes) -> Problem:
    """The question and its known answer. ValueError if one is missing; a malformed row raises all
    kinds of errors."""
    if isinstance(row, bytes):
        row = json.loads(row)
    # Some data sets write Problem and Answer.
    row = {column.strip().lower(): value for column, value in row.items() if value is not None}
    question = question_of(row)
    answer = answer_of(row)
    if not question:
        raise ValueError("no question, its text is empty")
    if not 0 < len(answer) <= LONGEST:
        raise ValueError(f"no answer of 1 to {LONGEST} characters")
    return Problem(question, answer)


def missing(what: str, wanted: Sequence[str], row: dict) -> ValueError:
    found = ", ".join(row) or "none"
    return ValueError(f"no {what}; wanted is a column {' or '.join(wanted)}, found: {found}")


def question_of(row: dict) -> str:
    """The question without the template that may stand around it. ValueError without a column."""
    given = [row[column] for column in QUESTION_COLUMNS if column in row]
    if not given:
        raise missing("question", QUESTION_COLUMNS, row)
    text = given[0]
    if isinstance(text, list):
        text = last_words_of_the_user(text)
    before, after = DAPO.split("{problem}")
    return text.strip().removeprefix(before).removesuffix(after).strip()


def last_words_of_the_user(chat: list[dict]) -> str:
    """The question, where it is put as a chat, as in DAPO-Math-17k."""
    for message in reversed(chat):
        if message["role"] == "user":
            return message["content"]
    return ""


def answer_of(row: dict) -> str:
    """The known answer: what follows `####` (GSM8K), what the last box holds, or the whole text; of
    a solution an empty text if it has neither. ValueError without a column."""
    reward_model = row.get("reward_model")
    is_read = isinstance(reward_model, dict)  # in a csv file it is text
    in_reward_model = reward_model.get("ground_truth") if is_read else None
    given = [row[column] for column in ANSWER_COLUMNS if column in row]
    if in_reward_model is not None:
        given.insert(0, in_reward_model)
    is_a_solution = not given
    if is_a_solution and "solution" not in row:
        raise missing("answer", (*ANSWER_COLUMNS, "solution", "reward_model"), row)

    text = row["solution"] if is_a_solution else given[0]
    if isinstance(text, list) and len(text) == 1:  # as OlympiadBench has it
        text = text[0]
    if not isinstance(text, str):
        text = str(Fraction(str(text)))  # 27.0 is written as 27
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = final_answer(text, "chat")
    if boxed is not None:
        return boxed
    # An answer may be bare, a solution may not.
    return "" if is_a_solution else text.strip()


def load_problems(data: str, split: str) -> tuple[dict[str, Problem], int]:
    """The problems of a file or a hub data set by the hash of their text, and how many copies were
    left out. FileNotFoundError, and ValueError for whatever else is wrong with the data."""
    file = Path(data)
    has_file_name = file.suffix in (".jsonl", ".json", ".csv", ".parquet")
    may_be_hub_id = data.count("/") == 1 and not has_file_name
    if data and not file.exists() and not may_be_hub_id:
        raise FileNotFoundError(
            f"{data} is neither a file nor a hub data set id such as owner/name"
        )

    problems: dict[str, Problem] = {}
    copies = 0
    row_name = "line" if file.suffix == ".jsonl" else "row"
    place = ""
    try:
        rows = read_rows(data, split)
        for i, row in enumerate(rows, start=1):
            place = f", {row_name} {i}"
            is_blank = isinstance(row, bytes) and not row.strip()
            if is_blank:
                continue
            problem = read_problem(row)
            words = " ".join(problem.prompt.split())
            key = hashlib.sha256(words.encode()).hexdigest()
            if key in problems:  # the first of several copies counts
                copies += 1
            problems.setdefault(key, problem)
    except Exception as error:  # libraries raise all kinds; a reader needs where and why
        raise ValueError(f"{data}{place}: {reason(error)}") from None
    if data and not problems:
        raise ValueError(f"{data}: no problems")
    return problems, copies


def reason(error: Exception) -> str:
    """The first line of an error's message, and what may help."""
    first_line = str(error).partition("\n")[0]
    if type(error) is ModuleNotFoundError:
        return f"{first_line}; pip install datasets"
    if type(error) is AttributeError:
        return f"{first_line}; malformed row"
    return first_line


class Math:
    """Problems in the order of a hash of their text, which also chooses 5 % of the training data,
    at least 1, for `validation`. Problems that are in the test data are taken out of the training
    data."""

    def __init__(self, data: str, test_data: str, template: str, date: str = "") -> None:
        train, train_copies = load_problems(data, "train")
        test, test_copies = load_problems(test_data, "test")

        # The hash alone decides, so more problems do not move these to another split.
        keys = sorted(train.keys() - test.keys())
        validation_keys = [key for key in keys if int(key[-4:], 16) % 20 == 0] or keys[:1]
        train_keys = sorted(set(keys) - set(validation_keys))

        self.template = template
        self.today = read_date(date)
        self.train = [train[key] for key in train_keys]
        self.validation = [train[key] for key in validation_keys]
        self.test = [test[key] for key in sorted(test)]

        copies = train_copies + test_copies
        in_test = len(train) - len(keys)
        print(
            f"math: {len(self.train)} training, {len(self.validation)} validation and "
            f"{len(self.test)} test problems; left out: {copies} duplicates, "
            f"{in_test} training problems that are in the test data"
        )
        check_math_verify([*train.values(), *test.values()])

    @property
    def timeouts(self) -> int:
        """Answers whose grading was given up, in this process so far."""
        return graders.timeouts

    def encode(self, problem: Problem, tokenizer) -> list[int]:
        """Token ids of the prompt, with the BOS that the tokenizer or its chat template puts
        there."""
        text = TEMPLATES[self.template].replace("{problem}", problem.prompt)
        if self.template != "chat":
            return tokenizer.encode(text)
        if not tokenizer.chat_template:
            raise ValueError("--template chat needs a tokenizer with a chat template")
        conversation = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            conversation,
            chat_template=on_day(tokenizer.get_chat_template(), self.today),
            add_generation_prompt=True,
            return_dict=False,
        )

    def reward(self, problem: Problem, response: str, finished: bool) -> float:
        """+1.0 if the final answer is right, else -1.0. A response cut at the length limit (not
        `finished`) is wrong."""
        if not finished:
            return -1.0
        answer = final_answer(response, self.template) or ""
        return 1.0 if math_equal(answer, problem.answer) else -1.0

    def rewards(
        self, problems: Sequence[Problem], responses: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        """The reward of each answer of a step. All that math-verify has to say is asked first, of
        several processes side by side; what takes longer than a step may is wrong."""
        questions = []
        for problem, response, is_finished in zip(problems, responses, finished):
            answer = final_answer(response, self.template) if is_finished else None
            questions += open_questions(answer or "", problem.answer) or []
        with graders.step():
            graders.ask(questions)
            return [self.reward(*answer) for answer in zip(problems, responses, finished)]


def read_date(date: str) -> datetime.date:
    """2026-11-26, or an empty text for today. ValueError."""
    try:
        return datetime.date.fromisoformat(date) if date else datetime.date.today()
    except ValueError:
        raise ValueError(f"--date must be a day such as 2026-11-26; it is {date!r}") from None


def on_day(chat_template: str, day: datetime.date) -> str:
    """The template as it is on that day: some chat models are told today's date, and a resumed run
    must have the prompts that it began with."""

    def tell(call: re.Match) -> str:
        return repr(day.strftime(call["format"]))

    return re.sub(r"""strftime_now\(\s*(["'])(?P<format>.*?)\1\s*\)""", tell, chat_template)


def check_math_verify(problems: Sequence[Problem]) -> None:
    """ValueError if the known answers need math-verify and it is not there."""
    if math_equal("\\frac{1}{2}", "0.5"):
        return
    hard = [problem.answer for problem in problems if not is_number(problem.answer)]
    if hard:
        example = f"{len(hard)} answers, such as {hard[0]}"
        raise ValueError(f"{example}, need pip install math-verify==0.9.0")
    print(
        "answers that are no plain numbers will count as wrong "
        "without pip install math-verify==0.9.0"
    )
