"""English arithmetic for `--task math`: `python -m lab.arithmetic FOLDER` writes FOLDER/train.jsonl
and FOLDER/test.jsonl.

A problem is two whole numbers and an operator, asked in one of a few sentences, in digits or in
words: "Subtract nine from seventy-one." It occurs once in all the data, in one sentence: so test
problems are new as arithmetic, not only as text (4 + 8 and 8 + 4 are one problem). `--task math`
takes its validation problems out of train.jsonl, so they are new in the same sense.

Asked alone, a model of 135 M parameters seldom boxes its answer. So worked examples stand before
each question, as earlier turns of the chat. Their marks are ChatML's, which SmolLM2 and Qwen have:
the text of a problem closes the user's turn itself, opens the next, and `--template chat` puts its
instruction and the last marks behind.

Easy and hard problems are mixed so that SmolLM2-135M-Instruct gets between a fifth and three fifths
of the answers right (0.38 of those to the test, lab/SMOLLM2.md): from groups that are all right or all
wrong GRPO learns nothing.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from plumbing.checkpoint import atomic_write
from tasks.mathematics import TEMPLATES

SEED = 0

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

SENTENCES = {
    "+": ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"),
    "-": (
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "What is the difference between {a} and {b}?",
    ),
    "*": (
        "What is {a} times {b}?",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
    ),
}


@dataclass(frozen=True)
class Calculation:
    """a, operator, b. Of the two orders of a sum or a product it stands for both; a difference is
    never negative. So a >= b."""

    a: int
    operator: str
    b: int

    @property
    def result(self) -> int:
        if self.operator == "+":
            return self.a + self.b
        if self.operator == "-":
            return self.a - self.b
        return self.a * self.b


@dataclass(frozen=True)
class Kind:
    """Calculations of about one difficulty: all pairs of numbers from two ranges."""

    operator: str
    a: range
    b: range
    train: int  # problems
    test: int


SMALL = range(1, 16)
LARGE = range(16, 100)
KINDS = (
    Kind("+", SMALL, SMALL, train=79, test=40),
    Kind("-", SMALL, SMALL, train=80, test=40),
    Kind("*", range(2, 13), range(2, 13), train=45, test=20),
    Kind("+", LARGE, range(1, 100), train=40, test=15),
    Kind("-", LARGE, range(1, 100), train=30, test=10),
    Kind("*", LARGE, range(2, 10), train=10, test=5),
)

# Worked before each question. They are no problems of the data.
EXAMPLES = (
    ("What is 8 plus 4?", Calculation(8, "+", 4)),
    ("What is seventeen minus nine?", Calculation(17, "-", 9)),
    ("What is 6 times 3?", Calculation(6, "*", 3)),
)


def in_words(number: int) -> str:
    """0 to 99."""
    if number < 20:
        return ONES[number]
    tens = TENS[number // 10 - 2]
    ones = number % 10
    return f"{tens}-{ONES[ones]}" if ones else tens


# Three problems in four are in digits: words are harder.
WRITINGS = (str, str, str, in_words)


def calculations(kind: Kind) -> list[Calculation]:
    """Every one once, in a fixed order."""
    pairs = {(max(a, b), min(a, b)) for a in kind.a for b in kind.b}
    examples = [calculation for _, calculation in EXAMPLES]
    found = [Calculation(a, kind.operator, b) for a, b in sorted(pairs)]
    return [calculation for calculation in found if calculation not in examples]


def question(calculation: Calculation, rng: random.Random) -> str:
    """In one of its sentences, in digits or in words, a sum or a product in either order."""
    numbers = [calculation.a, calculation.b]
    if calculation.operator != "-":
        rng.shuffle(numbers)
    write = rng.choice(WRITINGS)
    sentence = rng.choice(SENTENCES[calculation.operator])
    return sentence.format(a=write(numbers[0]), b=write(numbers[1]))


def worked(calculation: Calculation) -> str:
    """The answer that an example gives."""
    equation = f"{calculation.a} {calculation.operator} {calculation.b} = {calculation.result}"
    return f"{equation}, so the answer is \\boxed{{{calculation.result}}}."


def chat(asked: str) -> str:
    """The examples and a question, from the first words of the user to the last, without the
    instruction that --template chat will put behind."""
    text = ""
    for example, calculation in EXAMPLES:
        text += TEMPLATES["chat"].replace("{problem}", example)
        text += f"<|im_end|>\n<|im_start|>assistant\n{worked(calculation)}"
        text += "<|im_end|>\n<|im_start|>user\n"
    return text + asked


def problems(seed: int = SEED) -> tuple[list[dict], list[dict]]:
    """The rows of train.jsonl and of test.jsonl."""
    rng = random.Random(seed)
    train = []
    test = []
    for kind in KINDS:
        drawn = rng.sample(calculations(kind), kind.train + kind.test)
        rows = []
        for calculation in drawn:
            text = chat(question(calculation, rng))
            rows.append({"problem": text, "answer": str(calculation.result)})
        train += rows[: kind.train]
        test += rows[kind.train :]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def write(folder: Path, seed: int = SEED) -> None:
    """OSError if it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), problems(seed)):
        lines = [json.dumps(row) + "\n" for row in rows]
        with atomic_write(folder / f"{name}.jsonl") as fresh:
            fresh.write_text("".join(lines))
        print(f"{folder / name}.jsonl: {len(rows)} problems")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", help="to write train.jsonl and test.jsonl to")
    parser.add_argument("--seed", type=int, default=SEED, help="other problems")
    arguments = parser.parse_args()
    try:
        write(Path(arguments.folder), arguments.seed)
    except OSError as error:
        sys.exit(f"lab.arithmetic: {error}")


if __name__ == "__main__":
    main()
