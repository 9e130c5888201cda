"""lab/arithmetic.py: each problem has its right answer and no calculation occurs twice, by a parser
of the sentences that shares nothing with what wrote them."""

import json
import re
import sys
from collections import Counter

import pytest

from lab import arithmetic
from tasks.math_grader import final_answer, math_equal
from tasks.mathematics import Math

# Written out by hand, and added up: the generator goes the other way, by division.
VALUES = """
one 1 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9 ten 10 eleven 11 twelve 12
thirteen 13 fourteen 14 fifteen 15 sixteen 16 seventeen 17 eighteen 18 nineteen 19 twenty 20
thirty 30 forty 40 fifty 50 sixty 60 seventy 70 eighty 80 ninety 90
""".split()

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."

FORMS = [
    (r"What is (\S+) plus (\S+)\?", "+"),
    (r"Add (\S+) and (\S+)\.", "+"),
    (r"What is the sum of (\S+) and (\S+)\?", "+"),
    (r"What is (\S+) minus (\S+)\?", "-"),
    (r"What is the difference between (\S+) and (\S+)\?", "-"),
    (r"Subtract (?P<taken>\S+) from (?P<whole>\S+)\.", "-"),
    (r"What is (\S+) times (\S+)\?", "*"),
    (r"Multiply (\S+) by (\S+)\.", "*"),
    (r"What is the product of (\S+) and (\S+)\?", "*"),
]


def number(text):
    if text.isdigit():
        return int(text)
    return sum(int(VALUES[VALUES.index(word) + 1]) for word in text.split("-"))


def parse(sentence):
    """-> a, operator, b, and which form it is."""
    for form, (pattern, operator) in enumerate(FORMS):
        match = re.fullmatch(pattern, sentence)
        if match and "taken" in match.groupdict():
            return number(match["whole"]), operator, number(match["taken"]), form
        if match:
            return number(match[1]), operator, number(match[2]), form
    raise AssertionError(sentence)


def value(a, operator, b):
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def same_for_both_orders(a, operator, b):
    return (operator, a, b) if operator == "-" else (operator, *sorted((a, b)))


def turns(row):
    """Roles and words of the chat that --template chat makes of a problem's text."""
    problem = row["problem"]
    text = f"<|im_start|>user\n{problem}{INSTRUCTION}<|im_end|>\n"
    found = re.findall(r"<\|im_start\|>(user|assistant)\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
    joined = [f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in found]
    assert "".join(joined) == text  # nothing stands outside a turn
    asked = [words.endswith(INSTRUCTION) for _, words in found]
    assert asked == [role == "user" for role, _ in found]
    return [(role, words.removesuffix(INSTRUCTION)) for role, words in found]


def read(folder, name):
    rows = (folder / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    arithmetic.write(folder)
    return folder


def test_every_answer_is_right_and_every_form_occurs(folder):
    """In digits and in words; a quarter is in words."""
    forms = Counter()
    rows = read(folder, "train") + read(folder, "test")
    for row in rows:
        question = turns(row)[-1][1]
        a, operator, b, form = parse(question)
        assert row["answer"] == str(value(a, operator, b)), question
        assert 1 <= a <= 99 and 1 <= b <= 99 and int(row["answer"]) >= 0
        has_digits = any(character.isdigit() for character in question)
        forms[form, has_digits] += 1
    assert len(forms) == 2 * len(FORMS)
    in_words = sum(count for (_, has_digits), count in forms.items() if not has_digits)
    assert 0.2 < in_words / len(rows) < 0.3


def test_no_calculation_occurs_twice_in_any_order_or_sentence(folder):
    """Neither in the examples, the training and the test data together nor in one of them."""
    train = read(folder, "train")
    test = read(folder, "test")
    questions = [words for role, words in turns(train[0]) if role == "user"][:-1]
    questions += [turns(row)[-1][1] for row in train + test]
    calculations = [same_for_both_orders(*parse(question)[:3]) for question in questions]
    assert len(questions) == 3 + 284 + 130
    assert len(set(calculations)) == len(calculations)


def test_the_worked_examples_are_right_and_graded_right(folder):
    """The same three before each question; the grader finds and accepts their answers."""
    for row in read(folder, "train"):
        chat = turns(row)
        assert [role for role, _ in chat] == ["user", "assistant"] * 3 + ["user"]
        assert chat[:-1] == turns(read(folder, "test")[0])[:-1]
    for (_, question), (_, answer) in zip(chat[:-1:2], chat[1::2]):
        a, operator, b, _ = parse(question)
        assert answer.startswith(f"{a} {operator} {b} = {value(a, operator, b)}, ")
        assert math_equal(final_answer(answer, "chat"), str(value(a, operator, b)))


def test_the_task_reads_them_and_leaves_none_out(folder):
    task = Math(str(folder / "train.jsonl"), str(folder / "test.jsonl"), "chat")
    assert len(task.train) + len(task.validation) == 284
    assert len(task.test) == 130 and len(task.validation) >= 5


def test_the_same_seed_writes_the_same_bytes(folder, tmp_path):
    arithmetic.write(tmp_path / "again")
    arithmetic.write(tmp_path / "other", seed=1)
    for name in ("train.jsonl", "test.jsonl"):
        written = (folder / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == written
        assert (tmp_path / "other" / name).read_bytes() != written


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(sys, "argv", ["lab.arithmetic", str(file)])
    with pytest.raises(SystemExit, match=r"^lab\.arithmetic: .*exists"):
        arithmetic.main()
