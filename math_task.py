r"""Real mathematics: data, templates, grading. Read after task.py, which has the same interface.
The final answer stands in a fixed place and is compared with the known one. No text may hang the loop or stop it: one
pass finds the answer, more than LONGEST characters are wrong unread, numbers and words are compared here, the rest by
math-verify in a process of its own. 9^{9^{9^9}} hangs in C code, which no exception ends, so that process sets itself an
alarm whose action is death: the answer is wrong, `timeouts` counts it. The paper does not say how it grades; here units
(in \text{} or known to math-verify), `%`, `x =` and a numeral's base are ignored.
"""

import functools
import hashlib
import json
import re
import signal
import sys
from fractions import Fraction
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from task import Problem

BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to put your answer on its own "
        'line after "Answer:".')
TEMPLATES = {"qwen-math": BOXED, "chat": BOXED, "none": "{problem}", "dapo": DAPO}
LONGEST, SECONDS = 300, 5.0                     # characters of an answer; seconds of math-verify, without its start
# Each pattern takes time linear in the text, or meets no more than LONGEST characters.
PLACE = re.compile(r"\\boxed\s*\{|\\(?!\\boxed).|[{}]|answer[ \t]*:", re.DOTALL | re.IGNORECASE)   # `\{` is no brace
NOISE = re.compile(r"(?<!\\)\\(?:!\s*|[,()\[\]$])|\$|\bdollars?\b")         # math delimiters, thin spaces, currency
WRAPPED = re.compile(r"\A\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}\Z")
SCALE = re.compile(r"hundred|thousand|million|billion|trillion|dozen|feet")
NUMBER = re.compile(r"[+-]?(?:\d+/0*[1-9]\d*|(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?)", re.ASCII)


def final_answer(response: str, template: str) -> str | None:
    r"""What follows the last `Answer:` in its line (dapo), what the last balanced \boxed{} holds (qwen-math, chat), or
    whichever of the two starts last (none); None without one. One pass with a stack of open braces."""
    start, end, stack = -1, -1, []
    for match in PLACE.finditer(response):
        if (token := match[0]) == "}":
            if stack and (opened := stack.pop())[0] != "{" and opened.end() > start and template != "dapo":
                start, end = opened.end(), match.start()
        elif token == "{" or token.startswith("\\boxed"):
            stack.append(match)
        elif token[0] != "\\" and template in ("dapo", "none"):
            start, end = match.end(), -1
    answer = response[start:end] if end >= 0 else response[start:].partition("\n")[0]
    return start >= 0 and answer.strip() or None


def plain(text: str) -> Fraction | str:
    r"""A number, or the text without what does not change an answer, down to the last period and percent sign."""
    text = NOISE.sub("", " ".join((final_answer(text, "chat") or text).split()).replace("{,}", ",").replace("−", "-"))
    for _ in range(4):                          # layers, as in **\text{(C)}.**
        text = WRAPPED.sub(r"\1", text.strip(" *").removesuffix(".").removesuffix("%").removesuffix("\\"))
    return Fraction(text.replace(",", "")) if NUMBER.fullmatch(text) else text


def math_equal(predicted: str, gold: str) -> bool:
    """Whether an answer is the known one. Never hangs and never raises, whatever `predicted` is."""
    if not 0 < len(predicted) <= LONGEST or {*SCALE.findall(predicted)} - {*SCALE.findall(gold)}:   # 5 million is not 5
        return False
    a, b = plain(predicted), plain(gold)
    word = isinstance(b, str) and b.replace(" ", "").isalpha() and len(b) > 3 - 2 * b.isupper()     # else east = seat
    here = a == b or word or isinstance(a, Fraction) and isinstance(b, Fraction)
    return str(a).casefold() == str(b).casefold() != "" if here else verified(str(a), str(b))


@functools.lru_cache(maxsize=2 ** 16)
def verified(predicted: str, gold: str) -> bool:
    """The word of math-verify, from a process that is started when there is none."""
    if Math.grader is None or Math.grader.poll() is not None:
        Math.grader = Popen([sys.executable, __file__], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True,
                            start_new_session=True)         # where Ctrl-C does not reach it
    reply = ""
    try:
        print(json.dumps([SECONDS, gold, predicted]), file=Math.grader.stdin, flush=True)
        return (reply := Math.grader.stdout.readline()) == "1\n"
    except OSError:                             # it died between two answers
        return False
    finally:                                    # also on Ctrl-C: the next answer must not get the reply to this one
        if not reply:
            Math.timeouts += 1
            Math.grader.kill()
            Math.grader.communicate()


def load(data: str, split: str) -> tuple[dict[str, Problem], int]:
    """The problems of a file or a hub data set by the hash of their text, and how many copies were left out."""
    path, rows, problems, where, (head, tail) = Path(data), [], {}, "", TEMPLATES["dapo"].split("{problem}")
    if data and not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet") or data.count("/") != 1):
        raise FileNotFoundError(f"{data} is neither a file nor a hub data set id such as owner/name")
    try:
        if path.suffix in (".jsonl", ".json"):
            rows = path.read_bytes().rstrip().split(b"\n") if path.suffix == ".jsonl" else json.loads(path.read_bytes())
            rows = rows["data"] if isinstance(rows, dict) else rows
        elif data:
            from datasets import load_dataset
            sets = load_dataset("parquet", data_files=data) if ".parquet" in data else load_dataset(*data.split(":"))
            rows = sets[split if split in sets or len(sets) > 1 else next(iter(sets))]
        for i, row in enumerate(rows, 1):
            where = f", {'line' if path.suffix == '.jsonl' else 'row'} {i}"
            row = json.loads(row) if isinstance(row, bytes) else row
            text = next((row[key] for key in ("problem", "question", "prompt") if row.get(key) is not None), "")
            if isinstance(text, list):          # a chat, as in DAPO-Math-17k, with the template around the problem
                text = next((message["content"] for message in reversed(text) if message["role"] == "user"), "")
            text = text.strip().removeprefix(head).removesuffix(tail).strip()
            golds = (row.get("reward_model") or {}).get("ground_truth"), row.get("answer"), row.get("solution")
            gold = next((g if isinstance(g, str) else str(Fraction(str(g))) for g in golds if g is not None), "")
            whole = "" if golds[:2] == (None, None) else gold       # an answer may be bare, a solution may not
            gold = (gold.rpartition("####")[2] if "####" in gold else final_answer(gold, "chat") or whole).strip()
            if not text or not gold or len(gold) > LONGEST:
                raise ValueError(f"no answer of 1 to {LONGEST} characters" if text else "no question")
            problems.setdefault(hashlib.sha256(" ".join(text.split()).encode()).hexdigest(), Problem(text, gold))
    except Exception as error:                  # libraries raise all kinds; a reader needs where and why
        hint = {ModuleNotFoundError: "; pip install datasets", AttributeError: "; malformed row"}.get(type(error), "")
        raise ValueError(f"{data}{where}: {str(error).partition(chr(10))[0]}{hint}") from None
    return problems, len(rows) - len(problems)


class Math:
    """Problems in the order of a hash of their text, which also chooses 5 % of the training data, at least 1, for
    `validation`. Problems that are in the test data are taken out of the training data."""
    grader, timeouts = None, 0                  # the process, and the answers over which one died

    def __init__(self, data: str, test_data: str, template: str) -> None:
        (train, copies), (test, more) = load(data, "train"), load(test_data, "test")
        keys = sorted(train.keys() - test.keys())
        held = [key for key in keys if int(key[-4:], 16) % 20 == 0] or keys[:1]
        self.template, self.test = template, [test[key] for key in sorted(test)]
        self.validation, self.train = [train[k] for k in held], [train[k] for k in sorted({*keys} - {*held})]
        print(f"math: {len(self.train)} training, {len(held)} validation and {len(test)} test problems; left out: "
              f"{copies + more} duplicates, {len(train) - len(keys)} training problems that are in the test data")
        hard = [p.answer for p in (*train.values(), *test.values()) if isinstance(plain(p.answer), str)]
        if not verified("\\frac{1}{2}", "0.5"):
            if hard:
                raise ValueError(f"{len(hard)} answers, such as {hard[0]}, need pip install math-verify==0.9.0")
            print("answers that are no plain numbers will count as wrong without pip install math-verify==0.9.0")

    def encode(self, problem: Problem, tokenizer) -> list[int]:
        """Token ids of the prompt, with the BOS that the tokenizer or its chat template puts there."""
        text = TEMPLATES[self.template].replace("{problem}", problem.prompt)
        if self.template != "chat":
            return tokenizer.encode(text)
        if not tokenizer.chat_template:
            raise ValueError("--template chat needs a tokenizer with a chat template")
        return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)

    def reward(self, problem: Problem, response: str, finished: bool) -> float:
        """+1.0 if the final answer is right, else -1.0. A response cut at the length limit is wrong."""
        return 1.0 if finished and math_equal(final_answer(response, self.template) or "", problem.answer) else -1.0


if __name__ == "__main__":                      # the process: grades line after line until its parent ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        seconds, *answers = json.loads(line)
        try:
            from math_verify import parse, verify       # here, off the clock; without it everything is wrong
            signal.setitimer(signal.ITIMER_REAL, seconds)
            gold, predicted = (parse(f"${answer}$", parsing_timeout=None) for answer in answers)    # limits of its own are
            right = verify(gold, predicted, allow_set_relation_comp=True, timeout_seconds=None)     # off: the same alarm
        except Exception:
            right = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(right), flush=True)
