"""Where is the entropy, and does it sit on exploratory reasoning? `python -m lab.analyze base runs/grpo`.

Samples responses (or reads saved ones), takes every token's entropy under the model, and compares
(the paper's Section 2)

    pivotal tokens       with the other tokens
    reflective actions   sentences that verify, correct or start again, with the others
    rare behaviours      the 10 % of sentences furthest from their 5 nearest sentences of the first
                         model, with the rest

over all, within bins of position, difficulty and length, and each kind with all the rest; English
also with words as frequent and at the same place; then what the models' responses do (Section 6).
Tables are printed; report.json, entropy.png (Figure 2) and responses.html (Figure 1) go to --out.

    lab/exploration.py       what counts as pivotal and reflective
    lab/reading.py           a response taken apart and scored
    lab/comparison.py        what counts as rare; entropy of one kind beside the others
    lab/word_controls.py     English: exploratory words beside like words
    lab/response_figures.py  what responses do
    lab/resampling.py        intervals and the permutation test
    lab/entropy_report.py    tables and picture
    lab/page.py              the coloured page
    lab/english.py           reports of English saved, tabulated and drawn

Ours, where the paper is silent: most words, and the splitter; sentence vectors, means of the first
model's last hidden states over the sentence read alone; 95 % intervals by a bootstrap over
problems; Cohen's d; the permutation test. End tokens are left out, and the last sentence of a
response cut at the limit. Difficulty is minus the chains that solve a countdown, a saved `level`,
or the share of the model's own answers that are wrong. Entropies are of the whole distribution at
--temperature, whatever --top-p the samples had.

On countdown the entropy of what the pivotal tokens are compared with is near 0 by construction
(see lab/exploration.py), so what informs is the base beside the trained model.
"""

import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from evaluate import plan_sampling
from lab.comparison import compare_kinds, compare_rare, nearest
from lab.entropy_report import draw_entropy, tables
from lab.exploration import COUNTDOWN, TEXT
from lab.page import page
from lab.reading import SLOTS, Reading, read_responses
from lab.response_figures import response_figures
from lab.word_controls import (
    kind_counts,
    pivotal_controls,
    reflective_controls,
    single_words,
)
from plumbing.memory import out_of_memory
from plumbing.pretrained import find_folder, open_pretrained
from plumbing.settings import (
    DTYPES,
    TEMPLATE_NAMES,
    EvaluationSettings,
    flag,
    parse_flags,
    pick_device,
)
from tasks import load_task

SHOWN = 3  # problems on the page
MAY_HELP = "what may help: less --max-new-tokens, --dtype bfloat16, a smaller model"


@dataclass
class Settings:
    models: tuple = flag(
        (),
        "model folders, run folders or hub ids; the first is the base of the others",
        nargs="+",
        type=str,
    )
    task: str = flag("countdown", "countdown, or math, whose responses are taken apart as English")
    data: str = flag("", "math: the training data, whose splits are train and validation")
    test_data: str = flag("", "math: the test data")
    template: str = flag("dapo", "math: how a problem is put", choices=TEMPLATE_NAMES)
    split: str = flag(
        "validation", "whose problems are taken", choices=("train", "validation", "test")
    )
    saved: str = flag(
        "",
        "read responses, do not sample: jsonl of problem, response (or solution) "
        "and, if known, level",
    )
    problems: int = flag(50, "how many, from the start")
    samples: int = flag(16, "responses per problem")
    temperature: float = flag(1.0, "of the samples and of the entropies")
    top_p: float = flag(1.0, "of the samples alone: entropies are of the whole distribution")
    max_new_tokens: int = flag(128, "longest response, in tokens")
    dtype: str = flag("float32", "of the weights and of the arithmetic", choices=DTYPES)
    device: str = flag("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    out: str = flag("runs/analysis", "folder for the report, the picture and the page")


def check(s: Settings) -> None:
    """ValueError or OSError, before the first model is sampled, for what cannot work."""
    if min(s.problems, s.samples, s.max_new_tokens) < 1:
        raise ValueError("--problems, --samples and --max-new-tokens must be at least 1")
    if not 1e-3 <= s.temperature <= 1e3:
        raise ValueError("--temperature must be from 0.001 to 1000")
    if not 0 < s.top_p <= 1:
        raise ValueError("--top-p must be greater than 0 and at most 1")
    for name in s.models:
        find_folder(name)
    if find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install matplotlib")


def check_memory(name: str, s: Settings) -> None:
    """ValueError, before the model is loaded, if sampling from it takes more than there is."""
    task = load_task(s.task, s.data, s.test_data, s.template)
    problems = getattr(task, s.split)[: s.problems]
    sampling = EvaluationSettings(
        samples=s.samples,
        slots=SLOTS,
        max_new_tokens=s.max_new_tokens,
        top_p=s.top_p,
        dtype=s.dtype,
    )
    device = pick_device(s.device)
    plan_sampling(open_pretrained(name), task, problems, sampling, device, MAY_HELP)


@torch.no_grad()
def analyze(s: Settings) -> dict:
    """Runs the command; returns what report.json holds. ValueError or OSError name what is wrong."""
    check(s)
    kinds = COUNTDOWN if s.task == "countdown" else TEXT
    behaviour: dict[str, dict] = {}
    pivotal: dict[str, dict] = {}
    reflective: dict[str, dict] = {}
    rare: dict[str, dict] = {}
    matched: dict[str, dict] = {"pivotal tokens": {}, "reflective actions": {}}
    words: dict[str, dict] = {}
    counts: dict[str, dict] = {}
    answers: dict[int, dict[str, Reading]] = {}  # problem -> model -> its first response
    base_vectors = None
    base_sentences: list[str] = []

    for name in dict.fromkeys(s.models):
        if not s.saved:
            check_memory(name, s)
        vectors, readings = read_responses(name, s)
        behaviour[name] = response_figures(readings, kinds)
        pivotal[name] = compare_kinds(readings, Reading.token_spans, kinds.tokens)
        reflective[name] = compare_kinds(readings, Reading.sentence_spans, kinds.sentences)

        counts[name] = kind_counts(readings, kinds)
        if kinds is TEXT:  # countdown has no words
            matched["pivotal tokens"][name] = pivotal_controls(readings, kinds)
            words[name] = single_words(readings, kinds)
            matched["reflective actions"][name] = reflective_controls(readings, kinds)

        # Rare is what the first model hardly says, and its own states measure the distance.
        sentences = [text for reading in readings for text in reading.sentence_texts()]
        if base_vectors is None:
            base_vectors = vectors
            base_sentences = sentences
        elif sentences and base_sentences:
            distance = nearest(base_vectors(sentences), base_vectors(base_sentences))
            rare[name] = compare_rare(readings, distance.numpy())

        for reading in readings:
            answers.setdefault(reading.problem, {}).setdefault(name, reading)

    shown = [answers[problem] for problem in sorted(answers)[:SHOWN]]
    report = {
        "settings": vars(s),
        "behaviour": behaviour,
        "comparisons": {
            "pivotal tokens": pivotal,
            "reflective actions": reflective,
            "rare behaviours": rare,
        },
        "controls": matched,
        "words": words,
        "counts": counts,
        "answers": [plain_answers(case) for case in shown],
    }
    print(
        f"{len(answers)} problems, {len(readings)} responses, entropies in nats, "
        f"95 % intervals over problems\n{tables(report)}"
    )
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "responses.html").write_text(page(shown, kinds), encoding="utf-8")
    write_json(report, out / "report.json")
    draw_entropy(report, out / "entropy.png")
    return report


def plain_answers(case: dict[str, Reading]) -> dict[str, str]:
    """Model -> prompt and response."""
    return {name: f"{reading.prompt}\n{''.join(reading.pieces)}" for name, reading in case.items()}


def write_json(report: dict, file: Path) -> None:
    """With null where a figure is nan, which JSON does not have."""
    without_nan = json.loads(json.dumps(report), parse_constant=lambda _: None)
    file.write_text(json.dumps(without_nan, indent=1) + "\n")


if __name__ == "__main__":
    try:
        analyze(parse_flags(Settings, __doc__))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"lab.analyze: {error}")
    except (MemoryError, RuntimeError) as error:
        sys.exit(f"lab.analyze: {out_of_memory(error, MAY_HELP)}")
