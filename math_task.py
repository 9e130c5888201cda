r"""Real mathematics: data, templates, grading. Read after task.py, which has the same interface.

The concept: a *verifiable reward*. The final answer stands in a fixed place and is compared with the known one. No text
may hang the loop or stop it: one pass finds the answer, one of more than LONGEST characters is wrong unread, numbers and
words are compared here, and math-verify compares the rest in a process of its own. 9^{9^{9^9}} hangs inside C code, where
no exception arrives, so that process sets itself an alarm whose action is death: the answer is wrong, `timeouts` counts it,
and the next one gets a new process. The paper does not say how it grades; here units, `%` and `x =` may be missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

from task import Problem

BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
TEMPLATES = {"qwen-math": BOXED, "chat": BOXED, "none": "{problem}", "dapo": (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".')}
LONGEST = 300               # characters of an answer
SECONDS = 5.0               # for one answer in math-verify; starting the process does not count
# Each pattern takes time linear in the text, or meets no more than LONGEST characters.
PLACE = re.compile(r"\\boxed\s*\{|\\(?!\\boxed).|[{}]|answer[ \t]*:", re.DOTALL | re.IGNORECASE)    # `\{` is no brace
NOISE = re.compile(r"(?<!\\)\\(?:!\s*|[,()\[\]$])|\$|\bdollars?\b")         # math delimiters, thin spaces, currency
WRAPPED = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
NUMBER = re.compile(r"[+-]?(?:\d+/0*[1-9]\d*|(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?)", re.ASCII)
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def final_answer(response: str, template: str) -> str | None:
    r"""What follows the last `Answer:` in its line (dapo), what the last balanced \boxed{} holds (qwen-math, chat), or
    whichever of the two starts last (none); None without one. One pass with a stack of open braces."""
    start, end, stack = -1, -1, []
    for match in PLACE.finditer(response):
        if match[0] == "{" or match[0].startswith("\\boxed"):
            stack.append(match)
        elif match[0] == "}":
            opened = stack.pop() if stack else match
            if opened[0] not in "{}" and opened.end() > start and template != "dapo":
                start, end = opened.end(), match.start()
        elif match[0][0] != "\\" and template in ("dapo", "none"):
            start, end = match.end(), -1
    answer = response[start:end] if end >= 0 else response[start:].partition("\n")[0]
    return start >= 0 and answer.strip() or None


def plain(text: str) -> Fraction | str:
    r"""A number, or the text without what does not change an answer, down to the last period and percent sign."""
    text = NOISE.sub("", " ".join((final_answer(text, "chat") or text).split()).replace("{,}", ",").replace("−", "-"))
    before = None
    while text != before:
        before, text = text, text.strip(" *").removesuffix(".").removesuffix("%").removesuffix("\\")
        text = match[1] if (match := WRAPPED.fullmatch(text)) else text
    return Fraction(text.replace(",", "")) if NUMBER.fullmatch(text) else text


def math_equal(predicted: str, gold: str) -> bool:
    """Whether an answer is the known one. Never hangs and never raises, whatever `predicted` is."""
    if len(predicted) > LONGEST:
        return False
    a, b = plain(predicted), plain(gold)
    if a == b or isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b != ""
    if isinstance(b, str) and len(b) > 3 and b.replace(" ", "").isalpha():  # for math-verify, east = e·a·s·t = seat
        return str(a).casefold() == b.casefold()
    return verified(str(a), str(b))


@functools.lru_cache(maxsize=2 ** 16)
def verified(predicted: str, gold: str) -> bool:
    """The word of math-verify, from a process that is started when there is none."""
    if Math.grader is None:                     # in a session of its own, where Ctrl-C does not reach it
        Math.grader = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    reply, grader = "", Math.grader
    try:
        print(json.dumps([SECONDS, predicted, gold]), file=grader.stdin, flush=True)
        reply = grader.stdout.readline()
    except BrokenPipeError:
        pass
    finally:                                    # also on Ctrl-C: the next answer must not get the reply to this one
        if not reply:
            Math.grader, Math.timeouts = None, Math.timeouts + 1
            grader.kill()
            grader.communicate()
    return reply == "1\n"


def to_problem(row: dict) -> Problem:
    """A row of a data set as a problem; an exception with the reason if it is none."""
    text = next((row[key] for key in ("problem", "question", "prompt") if row.get(key) is not None), "")
    if isinstance(text, list):                  # a chat, as in DAPO-Math-17k, where the template is already there
        text = [message["content"] for message in text if message["role"] == "user"][-1]
    head, tail = TEMPLATES["dapo"].split("{problem}")
    if not (text := text.strip().removeprefix(head).removesuffix(tail).strip()):
        raise ValueError("no question in problem, question or prompt")
    golds = (row.get("reward_model") or {}).get("ground_truth"), row.get("answer"), row.get("solution")
    gold = next((gold for gold in golds if gold is not None), "")
    gold = gold if isinstance(gold, str) else str(Fraction(str(gold)))
    if "####" in gold or "\\boxed" in gold or golds[:2] == (None, None):
        gold = gold.rpartition("####")[2] if "####" in gold else final_answer(gold, "chat") or ""
    if not 0 < len(gold := gold.strip()) <= LONGEST:
        raise ValueError(f"no answer in reward_model.ground_truth, answer or solution, or over {LONGEST} characters")
    return Problem(text, gold)


def load(data: str, split: str) -> tuple[dict[str, Problem], int]:
    """The problems of a file or a hub data set by the hash of their text, and how many copies were left out."""
    path, rows, problems, copies, where = Path(data), [], {}, 0, ""
    if data and not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet") or not HUB.fullmatch(data)):
        raise FileNotFoundError(f"{data} is neither a file nor a hub data set id such as owner/name")
    try:
        if path.suffix in (".jsonl", ".json"):
            text = path.read_bytes()
            rows = text.split(b"\n") if path.suffix == ".jsonl" else json.loads(text)
            rows = rows["data"] if isinstance(rows, dict) else rows
        elif data:
            from datasets import load_dataset
            name, _, configuration = data.partition(":")
            sets = load_dataset("parquet", data_files=data) if path.exists() else load_dataset(name, configuration or None)
            rows = sets[split if split in sets or len(sets) > 1 else next(iter(sets))]
        for number, row in enumerate(rows, 1):
            where = f", {'line' if path.suffix == '.jsonl' else 'row'} {number}"
            if not isinstance(row, bytes) or row.strip():
                problem = to_problem(json.loads(row) if isinstance(row, bytes) else row)
                key = hashlib.sha256(" ".join(problem.prompt.split()).encode()).hexdigest()
                copies += key in problems
                problems.setdefault(key, problem)
    except Exception as error:                  # libraries raise all kinds; what a reader needs is where and why
        where = where or (f", line {error.lineno}" if hasattr(error, "lineno") else "")
        why = getattr(error, "msg", str(error)).partition("\n")[0]
        raise ValueError(f"{data}{where}: {why}") from None
    return problems, copies


class Math:
    """Problems in the order of a hash of their text, of which 5 % of the training data, at least 1, are `validation`; so
    neither depends on the order of a file. Problems that are also in the test data are not trained on."""
    grader, timeouts = None, 0                  # the process, and the answers it died over

    def __init__(self, data: str, test_data: str, template: str) -> None:
        if template not in TEMPLATES:
            raise ValueError(f"--template must be one of {', '.join(TEMPLATES)}, not {template!r}")
        (train, copies), (test, more) = load(data, "train"), load(test_data, "test")
        keys = sorted(train.keys() - test.keys())
        held = [key for key in keys if int(key[-4:], 16) % 20 == 0] or keys[:1]
        self.template, self.test = template, [test[key] for key in sorted(test)]
        self.validation = [train[key] for key in held]
        self.train = [train[key] for key in sorted({*keys} - {*held})]
        print(f"math: {len(self.train)} training, {len(held)} validation and {len(test)} test problems; left out: "
              f"{copies + more} duplicates, {len(train) - len(keys)} training problems that are in the test data")
        if not verified("\\frac{1}{2}", "0.5"):
            hard = [p.answer for p in (*train.values(), *test.values()) if isinstance(plain(p.answer), str)]
            if hard:
                raise ValueError(f"{len(hard)} answers, such as {hard[0]}, need pip install math-verify==0.9.0")
            print("answers that are no plain numbers will count as wrong without pip install math-verify==0.9.0")

    def encode(self, problem: Problem, tokenizer) -> list[int]:
        """Token ids of the prompt, with the BOS that this tokenizer or its chat template puts there."""
        text = TEMPLATES[self.template].replace("{problem}", problem.prompt)
        if self.template != "chat":
            return tokenizer.encode(text)
        if not tokenizer.chat_template:
            raise ValueError("--template chat needs a tokenizer with a chat template")
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)

    def reward(self, problem: Problem, response: str, finished: bool) -> float:
        """+1.0 if the final answer is right, else -1.0. A response cut at the length limit is wrong."""
        return 1.0 if finished and math_equal(final_answer(response, self.template) or "", problem.answer) else -1.0


if __name__ == "__main__":                      # the process: grades line after line until its parent ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from math_verify import parse, verify
    except ImportError:
        parse = None                            # all is wrong, as Math says when it loads
    for line in sys.stdin:
        seconds, *answers = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:                                    # without limits of its own, which need the same alarm
            predicted, gold = (parse(f"${answer}$", parsing_timeout=None) for answer in answers)
            right = verify(gold, predicted, timeout_seconds=None)
        except Exception:
            right = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(right), flush=True)
