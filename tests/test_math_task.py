"""math_task.py: the real questions, a table of forms, hostile text, every data format and template."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path

import pytest

import math_task
from math_task import LONGEST, TEMPLATES, Math, final_answer, math_equal, verified
from task import Problem

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="pip install math-verify==0.9.0")
REAL = {"aime24": 30, "amc23": 40, "math500": 500, "gsm8k_test": 1319}


def raw_golds(name):
    """The answers as the file has them, read without math_task."""
    for line in (SHARED / f"{name}.jsonl").read_text().split("\n"):
        if line:
            yield str(json.loads(line)["answer"]).split("####")[-1].strip()


def decimal(text):
    """The value of a plain number, by another road than math_task's."""
    try:
        value = Decimal(text.replace(",", ""))
    except ArithmeticError:
        return None
    return value if value.is_finite() else None


@needs_math_verify
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real questions are not at {SHARED}")
@pytest.mark.parametrize("name", REAL)
def test_real_questions_grade_right_against_themselves_and_wrong_against_others(name, capsys):
    golds = list(raw_golds(name))
    task, died = Math("", str(SHARED / f"{name}.jsonl"), "dapo"), Math.timeouts
    assert len(golds) == REAL[name] and f"{len(task.test)} test" in capsys.readouterr().out
    assert len(task.test) == len({" ".join(p.prompt.split()) for p in task.test}) <= REAL[name]
    assert not task.train and not task.validation
    assert {p.answer for p in task.test} <= {gold if decimal(gold) is None or "." not in gold or name != "amc23"
                                             else gold.removesuffix(".0") for gold in golds}
    for gold in golds:
        for response in (f"Answer: {gold}", f"so\n\n**Answer:** ${gold}$.", f"Answer: $\\boxed{{{gold}}}$"):
            assert task.reward(Problem("", gold), response, True) == 1.0, response
        assert math_equal(gold, gold)
    numeric, others = [gold for gold in golds if decimal(gold) is not None], 0
    rng = random.Random(0)
    for gold in numeric:
        pool = [other for other in numeric if decimal(other) != decimal(gold)]
        for other in rng.sample(pool, 5):
            others += 1
            assert task.reward(Problem("", gold), f"Answer: {other}", True) == -1.0, (other, gold)
    hard = [gold for gold in golds if decimal(gold) is None]
    for gold, other in zip(hard, hard[1:] + hard[:1]):              # by hand: the equal neighbours of math500
        if gold != other:
            assert not math_equal(other, gold), (other, gold)
    assert Math.timeouts == died
    with capsys.disabled():
        print(f"\n{name}: {len(golds)} questions, {len(task.test)} without duplicates, {len(numeric)} numeric answers, "
              f"{others} wrong ones refused")


EQUAL = [  # predicted, gold
    ("18", "18"), ("18.0", "18"), ("27", "27.0"), ("25", "025"), ("-3", "−3"), ("+5", "5"), (".5", "0.50"),
    ("$5$.", "5"),
    ("1,000", "1000"), ("1{,}000", "1000"), ("1,\\!000", "1000"), ("10,\\!080", "10080"), ("1450000", "1,450,000"),
    ("\\$18.90", "18.9"), ("$5 dollars", "5"), ("32,348", "\\$32,\\!348"), ("25\\%", "25"), ("12.5%", "12.5"),
    ("\\boxed{34}", "34"), ("**34**", "34"), ("\\(34\\)", "34"), ("\\[34\\]", "34"), ("\\text{34}", "34"),
    ("6/8", "3/4"), ("0.75", "\\frac{3}{4}"), ("\\dfrac{3}{4}", "\\frac34"), ("\\tfrac{3}{4}", "0.75"),
    ("\\frac{9}{5}", "1\\frac{4}{5}"), ("275/2", "137 \\frac{1}{2}"), ("\\frac{-1}{2}", "-\\frac{1}{2}"),
    ("90", "90^\\circ"), ("90^{\\circ}", "90^\\circ"), ("90°", "90^\\circ"), ("90 degrees", "90^\\circ"),
    ("5.4", "5.4 \\text{ cents}"), ("15\\text{ cm}^2", "15\\mbox{ cm}^2"), ("864", "864 \\mbox{ inches}^2"),
    ("5 cm", "5"), ("18\\text{ eggs}", "18"), ("\\frac{270}{7}", "\\frac{270}7\\text{ degrees}"),
    ("(3, 4]", "(3,4]"), ("(3,4]", "3 < x \\le 4"), ("x \\in (3,4]", "(3,4]"), ("[-2,7]", "x \\in [-2,7]"),
    ("(3,\\infty) \\cup (-\\infty,2)", "(-\\infty, 2) \\cup (3, \\infty)"),
    ("-2,1", "1,-2"), ("1 \\text{ and } -2", "1,-2"), ("\\{2,1\\}", "\\{1,2\\}"), ("(6, 31, -1)", "(6,31,-1)"),
    ("1+\\sqrt{19}, 1-\\sqrt{19}", "1 \\pm \\sqrt{19}"),
    ("5", "x=5"), ("x = 5", "5"), ("-q + p", "p - q"), ("5(3x - 16)", "15x - 80"), ("-5i+6", "6 - 5i"),
    ("\\sqrt{242}", "11\\sqrt2"), ("y=-2x", "y = -2x"), ("2^{10}", "1024"), ("\\frac{6\\pi}{12}", "\\frac{\\pi}{2}"),
    ("\\begin{bmatrix} -2 \\\\ -14 \\end{bmatrix}", "\\begin{pmatrix} -2 \\\\ -14 \\end{pmatrix}"),
    ("Evelyn", "\\text{Evelyn}"), ("evelyn.", "\\text{Evelyn}"), ("\\mathrm{east}", "\\text{east}"),
    ("C", "\\text{(C)}"), ("(C)", "\\text{(C)}"), ("\\textbf{(C)}", "\\text{(C)}"), ("52_{8}", "52_8"), ("52", "52_8"),
]
DIFFERENT = [
    ("", "5"), ("$", "5"), ("19", "18"), ("-18", "18"), ("18.01", "18"), ("0.0000673", ".0000672"),
    ("1.000", "1000"), ("1e3", "1000"), ("1_000", "1000"), ("٣", "3"), ("3, 500", "3500"), ("1,00", "100"),
    ("5x", "5"), ("5 million", "5"), ("17 or 18", "18"),
    ("10000000000000000000001", "10000000000000000000000"), ("0.333333", "\\frac13"), ("0.0", "\\frac{1}{3000000}"),
    ("4/3", "\\frac{3}{4}"), ("1/0", "3"), ("\\frac{1}{0}", "3"), ("\\frac{4}{5}", "1\\frac{4}{5}"),
    ("91", "90^\\circ"), ("5.5\\text{ cents}", "5.4 \\text{ cents}"), ("(3,4)", "(3,4]"), ("[3,4]", "(3,4]"),
    ("(-2,7)", "x \\in [-2,7]"),
    ("1,-2,3", "1,-2"), ("1", "1,-2"), ("(2,1)", "(1,2)"), ("1+\\sqrt{19}", "1 \\pm \\sqrt{19}"), ("x=6", "x=5"),
    ("y=5", "x=5"), ("q - p", "p - q"), ("15x + 80", "15x - 80"), ("6+5i", "6 - 5i"), ("2^{10}", "1025"),
    ("\\sqrt{243}", "11\\sqrt2"),
    ("Navin", "\\text{Evelyn}"), ("seat", "east"), ("seat", "\\text{east}"), ("B", "\\text{(C)}"), ("42", "52_8"),
]


@needs_math_verify
@pytest.mark.parametrize("predicted, gold, verdict",
                         [(*pair, True) for pair in EQUAL] + [(*pair, False) for pair in DIFFERENT])
def test_forms(predicted, gold, verdict):
    assert math_equal(predicted, gold) is verdict


def test_where_the_final_answer_is():
    table = [  # response, dapo, qwen-math and chat, none
        ("Answer: 34", "34", None, "34"),
        ("Answer: 1\nno\nAnswer: 2 \nthanks", "2", None, "2"),
        ("answer : 7", "7", None, "7"),
        ("Answer: 1 Answer: 2", "2", None, "2"),
        ("Answer:\n5", None, None, None),
        ("the answer is 5", None, None, None),
        ("\\boxed{3} then\nAnswer: 4", "4", "3", "4"),
        ("Answer: 4, so \\boxed{3}", "4, so \\boxed{3}", "3", "3"),
        ("\\boxed{1} \\boxed{\\frac{1}{2}}.", None, "\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\boxed {2}", None, "2", "2"),
        ("\\\\boxed{2}", None, "2", "2"),
        ("\\boxed{\\boxed{5}}", None, "5", "5"),
        ("\\boxed{1} and \\boxed{2", None, "1", "1"),
        ("\\boxed{\\{1, 2\\}}", None, "\\{1, 2\\}", "\\{1, 2\\}"),
        ("\\boxed{[0, 1\\}}", None, "[0, 1\\}", "[0, 1\\}"),
        ("} \\boxed{6} {", None, "6", "6"),
        ("\\boxed{}", None, None, None), ("\\boxed 5", None, None, None), ("", None, None, None),
    ]
    for response, dapo, boxed, none in table:
        found = [final_answer(response, template) for template in ("dapo", "qwen-math", "chat", "none")]
        assert found == [dapo, boxed, boxed, none], response


def test_reward_needs_the_right_place_and_a_finished_response(tmp_path):
    path = write(tmp_path, "t.jsonl", [{"problem": "2?", "answer": "34"}])
    for template, response, reward in [("dapo", "Answer: $\\boxed{34}$", 1.0), ("dapo", "\\boxed{34}", -1.0),
                                       ("qwen-math", "Answer: 34", -1.0), ("chat", "\\boxed{34}", 1.0),
                                       ("none", "34", -1.0), ("none", "Answer: 34", 1.0)]:
        task = Math("", path, template)
        assert task.reward(task.test[0], response, True) == reward
        assert task.reward(task.test[0], response, False) == -1.0


# ---------------------------------------------------------------------------------------------------- hostile text

def hostile():
    """10,000 responses, nearly all different, in the places where every template looks."""
    rng, megabyte = random.Random(0), 10 ** 6
    pieces = ["{", "}", "\\boxed{", "\\boxed", "Answer:", "answer : ", "\\", "\\\\", "$", "^", "_", "9", "\\frac",
              "\\sqrt[", "(", ")", "\x00", "\x1b[2J", "\r", "\n", "\ud800", "\udfff", "\u202e", "\u0301", "٣",
              "\ufeff", ",", ".", "%", "-", "+", "\\text{", "\\left", "\\begin{pmatrix}", "&", "=", "x", "!", "🙂",
              "\\!", "{,}"]
    yield from ("{" * megabyte, "}" * megabyte, "9" * megabyte, "\\boxed{" * (megabyte // 7),
                "Answer:" * (megabyte // 7), "\\" * megabyte, "\\boxed" + "{" * 100_000 + "}" * 100_000,
                "\\boxed{" + "9" * megabyte + "}",
                "Answer: " + "9" * megabyte, "\\boxed" + " " * megabyte, "answer" + " " * megabyte,
                "\\boxed {" * 100_000 + "}" * 100_000)
    for n in range(30):                                             # short enough to be read: these reach the process
        bad = ["9^{9^{9^{9}}}", "10^{10^{10}}", "{" * 100 + "3" + "}" * 100, "(" * 100 + "3" + ")" * 100,
               "(((((((x+1)^2+1)^2+1)^2+1)^2+1)^2+1)^2+1)^2", "\ud800\x00x^2", "\\sin(" * 40 + "x" + ")" * 40,
               "\\frac{" * 30 + "1" + "}{2}" * 30, "1," * 140 + "1", "\u202e\\frac{1}{2}", "^" * 200,
               "\\text{" * 40][n % 12]
        yield f"Answer: {bad}\n\\boxed{{{bad}}}"
    for n in range(3000):                                           # huge powers, too long to be read
        yield f"Answer: {n}" + "^{9" * 150 + "}" * 150
    for n in range(2000):                                           # digits
        text = str(rng.randrange(10 ** 40)) * rng.randrange(1, 12)
        yield f"\\boxed{{{text}}}\nAnswer: {text}"
    while True:                                                     # soup
        text = "".join(rng.choices(pieces, k=rng.randrange(150, 400)))
        yield rng.choice(["Answer: ", "\\boxed{", ""]) + text + "x" * LONGEST + rng.choice(["}", "", "}}"])


@needs_math_verify
def test_10_000_hostile_responses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(math_task, "SECONDS", 0.5)
    path = write(tmp_path, "t.jsonl", [{"problem": "2?", "answer": "3\\sqrt{2}"}])
    tasks, died, started = [Math("", path, template) for template in TEMPLATES], Math.timeouts, time.perf_counter()
    for i, response in zip(range(10_000), hostile()):
        assert tasks[i % 4].reward(tasks[0].test[0], response, True) == -1.0, response[:100]
    took = time.perf_counter() - started
    assert Math.timeouts > died                                     # some of it did reach the process and hung there
    monkeypatch.undo()
    assert math_equal("\\sqrt{18}", "3\\sqrt{2}")                   # and the next answer is graded
    with capsys.disabled():
        print(f"\n10,000 hostile responses: {took:.1f} s, {Math.timeouts - died} processes killed")


@needs_math_verify
def test_a_timeout_is_death_and_counted_and_the_next_answer_is_graded(monkeypatch):
    verified.cache_clear()
    assert math_equal("\\frac{10}{4}", "2\\frac12")
    monkeypatch.setattr(math_task, "SECONDS", 0.5)
    first, died = Math.grader, Math.timeouts
    assert not math_equal("9^{9^{9^{9}}}", "7\\sqrt2")
    assert Math.timeouts == died + 1 and first.returncode == -signal.SIGALRM
    assert not math_equal("9^{9^{9^{9}}}", "7\\sqrt2") and Math.timeouts == died + 1       # remembered
    monkeypatch.undo()
    assert math_equal("\\sqrt{98}", "7\\sqrt2") and not math_equal("\\sqrt{99}", "7\\sqrt2")
    assert Math.grader.pid != first.pid and Math.timeouts == died + 1


@needs_math_verify
def test_the_process_outlives_an_alarm_that_was_cleared(monkeypatch):
    verified.cache_clear()
    assert math_equal("\\sqrt{18}", "3\\sqrt2")                     # starts it, if need be
    monkeypatch.setattr(math_task, "SECONDS", 2.0)
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    pid = Math.grader.pid
    time.sleep(2.5)
    assert math_equal("\\sqrt{12}", "2\\sqrt3") and Math.grader.pid == pid


@needs_math_verify
def test_a_killed_process_is_replaced():
    verified.cache_clear()
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    os.kill(Math.grader.pid, signal.SIGKILL)
    Math.grader.wait()
    assert math_equal("\\sqrt{12}", "2\\sqrt3")


@needs_math_verify
def test_ctrl_c_while_an_answer_is_graded_leaves_no_reply_behind(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    verified.cache_clear()
    assert math_equal("\\sqrt{8}", "2\\sqrt2")
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            math_equal("9^{9^{9^{9}}}", "5\\sqrt2")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert math_equal("\\sqrt{50}", "5\\sqrt2") and not math_equal("\\sqrt{51}", "5\\sqrt2")


@needs_math_verify
def test_the_process_has_a_session_of_its_own_and_ends_with_its_parent():
    script = ("import math_task as m, os, sys; assert m.math_equal(r'\\sqrt{8}', r'2\\sqrt2'); pid = m.Math.grader.pid;"
              "assert os.getsid(pid) == pid != os.getsid(0); print(pid, flush=True); sys.stdin.read()")
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)                                                 # raises if it does not run
    parent.kill()
    parent.communicate()
    for _ in range(600):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z":
                return                                              # dead; its new parent has not looked yet
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    pytest.fail("the grading process lives on")


# ---------------------------------------------------------------------------------------------------- data

def write(folder, name, rows):
    """rows: dicts, or strings to be written as they are."""
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chat(text):
    return [{"role": "system", "content": "be brief"}, {"role": "user", "content": "earlier"},
            {"role": "assistant", "content": "?"}, {"role": "user", "content": text}]


DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on "
        "its own line after \"Answer:\".")
ROWS = [  # row, question, gold
    ({"problem": "a?", "question": "other", "prompt": "other", "answer": 27.0}, "a?", "27"),
    ({"question": "b?", "prompt": "other", "answer": "6 * 3 = 18\n#### 18"}, "b?", "18"),
    ({"prompt": "c?", "answer": 12}, "c?", "12"),
    ({"problem": "d?", "solution": "is \\boxed{1} or \\boxed{\\frac{1}{2}}."}, "d?", "\\frac{1}{2}"),
    ({"problem": "e?", "solution": "so\n#### 1,000", "answer": None}, "e?", "1,000"),
    ({"prompt": chat("f?"), "reward_model": {"ground_truth": "34", "style": "rule"}, "answer": "1"}, "f?", "34"),
    ({"prompt": chat(DAPO.format("g {problem} \\frac{1}{2}?")), "reward_model": {"ground_truth": "-7"}},
     "g {problem} \\frac{1}{2}?", "-7"),
    ({"problem": "h?", "answer": "so \\boxed{0.5}", "solution": "#### 9"}, "h?", "0.5"),
    ({"problem": "i?", "answer": 0.15}, "i?", "3/20"),
    ({"problem": "j?", "answer": "  p - q "}, "j?", "p - q"),
]
EXPECTED = {(question, gold) for _, question, gold in ROWS}


def pairs(problems):
    return {(p.prompt, p.answer) for p in problems}


@needs_math_verify
def test_jsonl_and_json(tmp_path, capsys):
    rows = [row for row, _, _ in ROWS]
    # and a duplicate, spaced otherwise; the first of them counts
    lines = write(tmp_path, "a.jsonl", rows + [{"problem": "g  {problem}\n\\frac{1}{2}?", "answer": 1}])
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}))
    for path in (lines, tmp_path / "b.json", tmp_path / "c.json"):
        assert pairs(Math("", str(path), "dapo").test) == EXPECTED
    out = capsys.readouterr().out
    assert "0 training, 0 validation and 10 test problems; left out: 1 duplicates, 0 training" in out
    assert out.count("\n") == 3


def test_parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, rows in (("text", ROWS[3:5]), ("chat", ROWS[5:7])):
        datasets.Dataset.from_list([row for row, _, _ in rows]).to_parquet(tmp_path / f"{name}.parquet")
        found = Math("", str(tmp_path / f"{name}.parquet"), "dapo").test
        assert pairs(found) == {(question, gold) for _, question, gold in rows}
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match="bad.parquet: "):
        Math("", str(tmp_path / "bad.parquet"), "dapo")


def test_hub_ids(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls, splits = [], {"train": [{"problem": "t?", "answer": 1}], "test": [{"problem": "u?", "answer": 2}]}

    def load_dataset(*arguments, **keywords):
        calls.append((arguments, keywords))
        if arguments[0] == "no/net":
            raise ConnectionError("Couldn't reach 'no/net' on the Hub\nmore")
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = Math("openai/gsm8k:main", "owner/name", "dapo")
    assert calls == [(("openai/gsm8k", "main"), {}), (("owner/name",), {})]
    assert pairs(task.validation) == {("t?", "1")} and pairs(task.test) == {("u?", "2")}
    with pytest.raises(ValueError, match="no/net: Couldn't reach 'no/net' on the Hub$"):
        Math("no/net", "", "dapo")
    del splits["test"]                                              # as AIME24 has it: all questions are called train
    assert pairs(Math("", "owner/name", "dapo").test) == {("t?", "1")}
    splits["validation"] = splits["train"]
    with pytest.raises(ValueError, match="owner/name: "):
        Math("", "owner/name", "dapo")


def test_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for data in ("owner/name", str(tmp_path / "a.parquet")):
        with pytest.raises(ValueError, match="pip install datasets"):
            Math(data, "", "dapo")


@pytest.mark.parametrize("line, reason", [
    ('{"problem": "a?", "answer": 1', "Expecting"), ("[1]", "malformed row"), ('{"answer": 1}', "no question"),
    ('{"problem": " ", "answer": 1}', "no question"), ('{"problem": 5, "answer": 1}', "malformed row"),
    ('{"prompt": [{"role": "system", "content": "a?"}], "answer": 1}', "no question"),
    ('{"problem": "a?"}', "no answer"),
    ('{"problem": "a?", "answer": ""}', "no answer"), ('{"problem": "a?", "answer": [1, 2]}', "Fraction"),
    ('{"problem": "a?", "solution": "it is 5"}', "no answer"), ('{"problem": "a?", "answer": NaN}', "Fraction"),
    ('{"problem": "a?", "answer": "' + "1" * (LONGEST + 1) + '"}', "300"),
    ('{"problem": "\\ud800?", "answer": 1}', "surrogates"), ("\udcff", "utf-8"), ("[" * 100_000, "recursion")])
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"problem": "fine?", "answer": 1}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ValueError) as error:
        Math(str(path), "", "dapo")
    assert str(error.value).startswith(f"{path}, line 2: ") and reason in str(error.value)


def test_bad_files(tmp_path):
    for name in ("no.jsonl", "no/no.json", "no.parquet", "nothing", "/a/b/c"):
        with pytest.raises(FileNotFoundError, match="is neither a file nor a hub data set id"):
            Math("", name, "dapo")
    (tmp_path / "bad.json").write_text('[{"problem": "a?",\n "answer": }]')
    with pytest.raises(ValueError, match=r"bad.json: Expecting value: line 2 column"):
        Math("", str(tmp_path / "bad.json"), "dapo")
    (tmp_path / "row.json").write_text('[{"problem": "a?", "answer": 1}, {"answer": 1}]')
    with pytest.raises(ValueError, match=r"row.json, row 2: no question"):
        Math("", str(tmp_path / "row.json"), "dapo")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("folder.jsonl", "empty.jsonl"):
        with pytest.raises(ValueError, match=name):
            Math("", str(tmp_path / name), "dapo")


def test_splits_depend_on_the_texts_only(tmp_path, capsys):
    rows = [{"problem": f"{i} + {i}?", "answer": 2 * i} for i in range(2000)]
    shuffled = random.Random(1).sample(rows, len(rows))
    held_out = rows[:50] + [{"problem": "new?", "answer": 1}]
    a = Math(write(tmp_path, "a.jsonl", rows + rows[:7]), write(tmp_path, "t.jsonl", held_out), "dapo")
    assert "left out: 7 duplicates, 50 training problems that are in the test data" in capsys.readouterr().out
    b = Math(write(tmp_path, "b.jsonl", shuffled), write(tmp_path, "u.jsonl", held_out[::-1]), "none")
    assert (a.train, a.validation, a.test) == (b.train, b.validation, b.test)
    train, validation, test = pairs(a.train), pairs(a.validation), pairs(a.test)
    assert test == {(row["problem"], str(row["answer"])) for row in held_out}
    assert train | validation == {(row["problem"], str(row["answer"])) for row in rows[50:]} and not train & validation
    assert 60 <= len(validation) <= 140                             # 1950 / 20 = 97.5, and 4 deviations of 9.6
    few = Math(write(tmp_path, "few.jsonl", rows[:3]), "", "dapo")
    assert len(few.validation) == 1 and len(few.train) == 2 and not few.test
    rows += [{"problem": f"x{i}?", "answer": i} for i in range(500)]
    more = Math(write(tmp_path, "more.jsonl", rows), "", "dapo")
    assert validation <= pairs(more.validation)                     # other problems do not move these


# ---------------------------------------------------------------------------------------------------- templates

def llama_tokenizer(**options):
    """Word-level, with a Llama-like post-processor: <s> in front, nothing behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "What", "?", "Please", "within", "U", "A"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   **options)


class Echo:
    """Gives back what it was asked to encode."""
    chat_template = "x"

    def encode(self, text):
        return text

    def apply_chat_template(self, conversation, **options):
        return conversation, options


def test_templates_word_for_word(tmp_path):
    question = "What is {problem} in \\boxed{x}?"
    path = write(tmp_path, "t.jsonl", [{"problem": question, "answer": 1}])
    boxed = question + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    expected = {"dapo": DAPO.replace("{}", "@").replace("@", question), "qwen-math": boxed, "none": question,
                "chat": ([{"role": "user", "content": boxed}], {"add_generation_prompt": True, "return_dict": False})}
    assert set(TEMPLATES) == set(expected)
    for template, text in expected.items():
        task = Math("", path, template)
        assert task.encode(task.test[0], Echo()) == text


def test_one_bos_and_the_chat_template(tmp_path):
    path = write(tmp_path, "t.jsonl", [{"problem": "What ?", "answer": 1}])
    for template in ("dapo", "qwen-math", "none"):
        task = Math("", path, template)
        ids = task.encode(task.test[0], llama_tokenizer())
        assert type(ids) is list and ids[0] == 0 and ids.count(0) == 1 and 1 not in ids and {3, 4} <= set(ids)
    assert ids == [0, 3, 4]
    task = Math("", path, "chat")
    form = "<s> {% for m in messages %}U {{ m.content }} {% endfor %}{% if add_generation_prompt %}A{% endif %}"
    ids = task.encode(task.test[0], llama_tokenizer(chat_template=form))
    assert type(ids) is list and ids.count(0) == 1 and ids[:4] == [0, 7, 3, 4] and ids[-1] == 8
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        task.encode(task.test[0], llama_tokenizer())


# ---------------------------------------------------------------------------------------------------- no math-verify

def test_without_math_verify(tmp_path, monkeypatch, capsys):
    """The process really fails to import it: a module of that name which raises stands before it on the path."""
    (tmp_path / "math_verify.py").write_text("raise ImportError('no')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(Math, "grader", None)
    verified.cache_clear()
    try:
        numeric = write(tmp_path, "n.jsonl", [{"problem": "a?", "answer": "1,000"}, {"problem": "b?", "answer": 0.5}])
        task = Math("", numeric, "dapo")
        assert "count as wrong without pip install math-verify==0.9.0" in capsys.readouterr().out.splitlines()[1]
        problem = next(p for p in task.test if p.prompt == "b?")
        for answer, reward in (("0.50", 1.0), ("1/2", 1.0), ("\\frac12", -1.0), ("\\frac13", -1.0)):
            assert task.reward(problem, f"Answer: {answer}", True) == reward
        assert Math.grader.poll() is None                           # one process says no to all, none is started again
        half = {"problem": "b?", "answer": "\\frac{1}{2}"}
        mixed = write(tmp_path, "m.jsonl", [{"problem": "a?", "answer": 1}, half])
        for data, test_data in ((mixed, ""), ("", mixed)):
            with pytest.raises(ValueError, match="1 answers, such as .frac.1..2., need pip install math-verify"):
                Math(data, test_data, "dapo")
    finally:
        Math.grader.kill()
        Math.grader.communicate()
        verified.cache_clear()


@needs_math_verify
@pytest.mark.parametrize("predicted, gold, right", [
    ("-2\\le x\\le 7", "x \\in [-2,7]", True), ("x>5", "(5,\\infty)", True), ("5 < x < 6", "[5,6]", False),
    ("5\\text{ million}", "5", False), ("5\\text{ dozen}", "5", False), ("5\\text{ million}", "5\\text{ million}", True),
    ("ACB", "ABC", False), ("ABC", "ABC", True), ("BA", "AB", False)])
def test_what_a_sceptic_found(predicted, gold, right):
    assert math_equal(predicted, gold) is right


@needs_math_verify
def test_a_grader_that_dies_between_two_answers_is_replaced(monkeypatch):
    assert math_equal("\\frac{2}{7}", "2/7")
    dead = Math.grader
    dead.kill()
    dead.wait()
    with monkeypatch.context() as patch:
        patch.setattr(dead, "poll", lambda: None)           # as if it had been asked a moment before
        assert not math_equal("\\frac{3}{8}+x", "x+y")
    assert math_equal("x+\\frac{1}{2}", "\\frac12+x") and Math.grader is not dead
