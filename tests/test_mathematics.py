"""tasks/mathematics.py: every data format, and what is said of a bad one, against rows written by
hand; the splits against the rows; the templates word for word, and with a tokenizer made here."""

import json
import random
import sys

import pytest

from questions import needs_math_verify, write
from tasks.math_grader import LONGEST
from tasks.mathematics import TEMPLATES, Math

# ------------------------------------------------------------------------------ data


def chat(text):
    return [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "earlier"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": text},
    ]


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
ROWS = [  # row, question, gold
    (
        {"problem": "a?", "question": "other", "prompt": "other", "answer": 27.0},
        "a?",
        "27",
    ),
    ({"question": "b?", "prompt": "other", "answer": "6 * 3 = 18\n#### 18"}, "b?", "18"),
    ({"prompt": "c?", "answer": 12}, "c?", "12"),
    (
        {"problem": "d?", "solution": "is \\boxed{1} or \\boxed{\\frac{1}{2}}."},
        "d?",
        "\\frac{1}{2}",
    ),
    ({"problem": "e?", "solution": "so\n#### 1,000", "answer": None}, "e?", "1,000"),
    (
        {
            "prompt": chat("f?"),
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "answer": "1",
        },
        "f?",
        "34",
    ),
    (
        {
            "prompt": chat(DAPO.format("g {problem} \\frac{1}{2}?")),
            "reward_model": {"ground_truth": "-7"},
        },
        "g {problem} \\frac{1}{2}?",
        "-7",
    ),
    ({"problem": "h?", "answer": "so \\boxed{0.5}", "solution": "#### 9"}, "h?", "0.5"),
    ({"problem": "i?", "answer": 0.15}, "i?", "3/20"),
    ({"problem": "j?", "answer": "  p - q "}, "j?", "p - q"),
    ({"ID": 1, "Problem": "k?", "Answer": 33, "Solution": "\\boxed{1}"}, "k?", "33"),
    ({"problem": "l?", "expected_answer": "2/3", "solution": "\\boxed{1}"}, "l?", "2/3"),
    ({"question": "m?", "final_answer": ["$x$"], "solution": ["long"]}, "m?", "$x$"),
    ({"problem": "n?", "expected_answer": "1", "answer": "2"}, "n?", "2"),
]


def rows_of(made):
    return [row for row, _, _ in made]


def expected_of(made):
    return {(question, gold) for _, question, gold in made}


def pairs(problems):
    return {(problem.prompt, problem.answer) for problem in problems}


@needs_math_verify
def test_jsonl_and_json(tmp_path, capsys):
    rows = rows_of(ROWS)
    # and a duplicate, spaced otherwise; the first of them counts
    duplicate = {"problem": "g  {problem}\n\\frac{1}{2}?", "answer": 1}
    lines = write(tmp_path, "a.jsonl", rows + [duplicate])
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}))
    for path in (lines, tmp_path / "b.json", tmp_path / "c.json"):
        assert pairs(Math("", str(path), "dapo").test) == expected_of(ROWS)

    out = capsys.readouterr().out
    counts = "0 training, 0 validation and 14 test problems; left out: 1 duplicates, 0 training"
    assert counts in out
    assert out.count("\n") == 3


def test_blank_lines_are_no_rows_and_are_counted_as_lines(tmp_path, capsys):
    rows = ["", {"problem": "a?", "answer": 1}, "  ", "\r", {"problem": "b?", "answer": 2}, "", ""]
    task = Math("", write(tmp_path, "a.jsonl", rows), "dapo")
    assert pairs(task.test) == {("a?", "1"), ("b?", "2")}
    assert "2 test problems; left out: 0 duplicates" in capsys.readouterr().out
    with pytest.raises(ValueError, match="b.jsonl, line 5: no answer"):
        Math("", write(tmp_path, "b.jsonl", [*rows[:4], {"problem": "b?"}]), "dapo")


def test_csv(tmp_path):
    """As a spreadsheet writes it: a mark at the start, quotes, cells of several lines, empty ones."""
    path = tmp_path / "a.csv"
    path.write_text(
        "Problem,Answer,Solution\n"
        '"What is ""1, 2""\nadded?",3,\n'
        "\n"
        "b?,,so \\boxed{4}\n"
        "ü?,27.50,long\n",
        encoding="utf-8-sig",
    )
    expected = {('What is "1, 2"\nadded?', "3"), ("b?", "4"), ("ü?", "27.50")}
    assert pairs(Math("", str(path), "dapo").test) == expected


def test_a_csv_file_with_the_text_of_a_reward_model(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("problem,answer,reward_model\na?,3,{'ground_truth': '4'}\n")
    assert pairs(Math("", str(path), "dapo").test) == {("a?", "3")}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("problem,answer\na?,1\nb?,\n", "row 2: no answer; wanted is a column answer or"),
        ("problem,answer\na?,1,2\n", "row 1: .*malformed row"),
        ("problem,answer\na?\n", "row 1: no answer"),
        ("problem,answer\n", "bad.csv: no problems"),
        ('problem,answer\n"a?,1\n', "bad.csv: unexpected end of data"),
    ],
)
def test_a_bad_csv_file(tmp_path, text, sentence):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        Math("", str(tmp_path / "bad.csv"), "dapo")


def test_columns_found_and_wanted_are_named(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"Query": "a?", "label": 1}])
    with pytest.raises(ValueError) as error:
        Math("", path, "dapo")
    assert str(error.value) == (
        f"{path}, line 1: no question; wanted is a column problem or question or prompt, "
        "found: query, label"
    )
    path = write(tmp_path, "b.jsonl", [{"question": "a?", "label": 1, "answer": None}])
    with pytest.raises(ValueError) as error:
        Math("", path, "dapo")
    assert str(error.value) == (
        f"{path}, line 1: no answer; wanted is a column answer or final_answer or expected_answer "
        "or solution or reward_model, found: question, label"
    )


def test_parquet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, made in (("text", ROWS[3:5]), ("chat", ROWS[5:7])):
        path = tmp_path / f"{name}.parquet"
        datasets.Dataset.from_list(rows_of(made)).to_parquet(path)
        assert pairs(Math("", str(path), "dapo").test) == expected_of(made)

    bad = tmp_path / "bad.parquet"
    bad.write_text("no")
    with pytest.raises(ValueError, match="bad.parquet: "):
        Math("", str(bad), "dapo")


def test_hub_ids(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    splits = {"train": [{"problem": "t?", "answer": 1}], "test": [{"problem": "u?", "answer": 2}]}

    def load_dataset(*arguments, **keywords):
        calls.append((arguments, keywords))
        if arguments[0] == "no/net":
            raise ConnectionError("Couldn't reach 'no/net' on the Hub\nmore")
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = Math("openai/gsm8k:main", "owner/name", "dapo")
    assert calls == [(("openai/gsm8k", "main"), {}), (("owner/name",), {})]
    assert pairs(task.validation) == {("t?", "1")}
    assert pairs(task.test) == {("u?", "2")}
    with pytest.raises(ValueError, match="no/net: Couldn't reach 'no/net' on the Hub$"):
        Math("no/net", "", "dapo")

    # As AIME24 has it: all questions are called train.
    del splits["test"]
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


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"problem": "a?", "answer": 1', "Expecting"),
        ("[1]", "malformed row"),
        ('{"answer": 1}', "no question"),
        ('{"problem": " ", "answer": 1}', "no question"),
        ('{"problem": 5, "answer": 1}', "malformed row"),
        ('{"prompt": [{"role": "system", "content": "a?"}], "answer": 1}', "no question"),
        ('{"problem": "a?"}', "no answer"),
        ('{"problem": "a?", "answer": ""}', "no answer"),
        ('{"problem": "a?", "answer": [1, 2]}', "Fraction"),
        ('{"problem": "a?", "solution": "it is 5"}', "no answer"),
        ('{"problem": "a?", "answer": NaN}', "Fraction"),
        ('{"problem": "a?", "answer": "' + "1" * (LONGEST + 1) + '"}', "300"),
        ('{"problem": "\\ud800?", "answer": 1}', "surrogates"),
        ("\udcff", "utf-8"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    bad_line = line.encode("utf-8", "surrogateescape")
    path.write_bytes(b'{"problem": "fine?", "answer": 1}\n' + bad_line + b"\n")
    with pytest.raises(ValueError) as error:
        Math(str(path), "", "dapo")
    message = str(error.value)
    assert message.startswith(f"{path}, line 2: ")
    assert reason in message


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
    a = Math(
        write(tmp_path, "a.jsonl", rows + rows[:7]),
        write(tmp_path, "t.jsonl", held_out),
        "dapo",
    )
    left_out = "left out: 7 duplicates, 50 training problems that are in the test data"
    assert left_out in capsys.readouterr().out
    b = Math(
        write(tmp_path, "b.jsonl", shuffled),
        write(tmp_path, "u.jsonl", held_out[::-1]),
        "none",
    )
    assert (a.train, a.validation, a.test) == (b.train, b.validation, b.test)

    train = pairs(a.train)
    validation = pairs(a.validation)
    assert pairs(a.test) == {(row["problem"], str(row["answer"])) for row in held_out}
    assert train | validation == {(row["problem"], str(row["answer"])) for row in rows[50:]}
    assert not train & validation
    assert 60 <= len(validation) <= 140  # 1950 / 20 = 97.5, and 4 deviations of 9.6

    few = Math(write(tmp_path, "few.jsonl", rows[:3]), "", "dapo")
    assert len(few.validation) == 1
    assert len(few.train) == 2
    assert not few.test

    # Other problems do not move these.
    rows += [{"problem": f"x{i}?", "answer": i} for i in range(500)]
    more = Math(write(tmp_path, "more.jsonl", rows), "", "dapo")
    assert validation <= pairs(more.validation)


# ------------------------------------------------------------------------------ templates


def llama_tokenizer(**options):
    """Word-level, with a Llama-like post-processor: <s> in front, nothing behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "What", "?", "Please", "within", "U", "A"]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **options,
    )


class Echo:
    """Gives back what it was asked to encode."""

    chat_template = "x"

    def get_chat_template(self):
        return self.chat_template

    def encode(self, text):
        return text

    def apply_chat_template(self, conversation, **options):
        return conversation, options


def test_templates_word_for_word(tmp_path):
    question = "What is {problem} in \\boxed{x}?"
    path = write(tmp_path, "t.jsonl", [{"problem": question, "answer": 1}])
    boxed = question + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    chat_options = {"chat_template": "x", "add_generation_prompt": True, "return_dict": False}
    expected = {
        "dapo": DAPO.replace("{}", "@").replace("@", question),
        "qwen-math": boxed,
        "none": question,
        "chat": ([{"role": "user", "content": boxed}], chat_options),
    }
    assert set(TEMPLATES) == set(expected)
    for template, text in expected.items():
        task = Math("", path, template)
        assert task.encode(task.test[0], Echo()) == text


def test_one_bos_and_the_chat_template(tmp_path):
    path = write(tmp_path, "t.jsonl", [{"problem": "What ?", "answer": 1}])
    for template in ("dapo", "qwen-math", "none"):
        task = Math("", path, template)
        ids = task.encode(task.test[0], llama_tokenizer())
        assert type(ids) is list
        assert ids[0] == 0
        assert ids.count(0) == 1
        assert 1 not in ids
        assert {3, 4} <= set(ids)
    assert ids == [0, 3, 4]

    task = Math("", path, "chat")
    users = "{% for m in messages %}U {{ m.content }} {% endfor %}"
    form = "<s> " + users + "{% if add_generation_prompt %}A{% endif %}"
    ids = task.encode(task.test[0], llama_tokenizer(chat_template=form))
    assert type(ids) is list
    assert ids.count(0) == 1
    assert ids[:4] == [0, 7, 3, 4]
    assert ids[-1] == 8
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        task.encode(task.test[0], llama_tokenizer())


def test_a_chat_template_tells_the_day_that_the_task_has(tmp_path, monkeypatch):
    """Against what transformers renders on that day, when its clock says so."""
    from transformers.utils import chat_template_utils

    form = (
        "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
        '{{ day }} is {{ strftime_now( "%A" ) }}{% else %}no clock{% endif %}'
        "{% for m in messages %}: {{ m.content }}{% endfor %}"
    )
    path = write(tmp_path, "t.jsonl", [{"problem": "What ?", "answer": 1}])

    class Clock(chat_template_utils.datetime):
        @classmethod
        def now(cls):
            return cls(2024, 2, 29)

    class Tokenizer(Echo):
        """Gives back the text of the prompt."""

        chat_template = form

        def apply_chat_template(self, conversation, chat_template, **options):
            [text], _ = chat_template_utils.render_jinja_template(
                [conversation], chat_template=chat_template
            )
            return text

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    task = Math("", path, "chat", date="2024-02-29")
    text = task.encode(task.test[0], Tokenizer())
    conversation = [{"role": "user", "content": TEMPLATES["chat"].replace("{problem}", "What ?")}]
    [expected], _ = chat_template_utils.render_jinja_template([conversation], chat_template=form)
    assert text == expected
    assert text.startswith("29 Feb 2024 is Thursday: What ?")

    task = Math("", path, "chat", date="2023-12-01")
    text = task.encode(task.test[0], Tokenizer())
    assert text.startswith("01 Dec 2023 is Friday: What ?")


def test_a_date_that_is_none(tmp_path):
    path = write(tmp_path, "t.jsonl", [{"problem": "What ?", "answer": 1}])
    with pytest.raises(ValueError, match="--date must be a day such as 2026-11-26; it is 'today'"):
        Math("", path, "chat", date="today")
