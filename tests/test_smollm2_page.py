"""lab/SMOLLM2.md: its tables are those that the saved results give, its commands are those that were
run, and its figures are counted here once more from the saved results, apart from the code that makes
the tables."""

import dataclasses
import gzip
import json
import math
import re
import shlex
import statistics
from pathlib import Path

import pytest

from lab import analyze, effect, real_model
from lab.arithmetic import problems
from lab.smollm2_tables import effect_text, page_tables
from plumbing.settings import EvaluationSettings, parse_flags
from plumbing.settings import Settings as TrainSettings

PAGE = Path("lab/SMOLLM2.md").read_text()
RESULTS = Path("lab/results")
# Of settings: where something lies, or goes. Not compared.
PLACES = {
    "name",
    "out",
    "overwrite",
    "resume",
    "model",
    "models",
    "data",
    "test_data",
    "json",
    "date",
}
PLACES |= {"device", "figure", "again", "preset", "decode_dtype"}


def unpacked(name):
    return gzip.decompress((RESULTS / name).read_bytes()).decode()


def saved(name):
    return json.loads(unpacked(f"{name}.json.gz"))


def is_verbatim(line):
    """A row of a table, a command or output."""
    return line.startswith(("|", "    "))


def prose():
    lines = [line for line in PAGE.splitlines() if not is_verbatim(line)]
    return " ".join(" ".join(lines).split())


@pytest.fixture(scope="module")
def tables():
    return page_tables()


@pytest.fixture(scope="module")
def printed_effect():
    return [line.rstrip() for line in effect_text().splitlines()]


def test_the_tables_are_those_of_the_saved_results_and_there_are_no_others(tables):
    assert [block for block in PAGE.split("\n\n") if block.startswith("|")] == tables


def test_rows_of_the_effect_are_made_again(printed_effect):
    indented = [line[4:] for line in PAGE.splitlines() if line.startswith("    ")]
    rows = [line for line in indented if not line.startswith(("python", "pip"))]
    assert len(rows) == 24
    for row in rows:
        assert row in printed_effect, row


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert Path("lab", target).exists(), target


# Commands.


def settings_of(program, Settings, also=""):
    """What the page's commands of this program mean, in their order."""
    lines = re.findall(rf"^    python {re.escape(program)} (.*)$", PAGE, re.M)
    return [parse_flags(Settings, program, shlex.split(f"{line} {also}")) for line in lines]


def assert_was_run(command, settings):
    """`settings`: as they were saved. There may be new ones since."""
    now = json.loads(json.dumps(dataclasses.asdict(command)))
    for name, value in settings.items():
        assert name in PLACES or now[name] == value, name


def test_the_training_commands_are_those_that_were_run():
    # Of the card: micro-batches are larger on it.
    with_it, without = settings_of("train.py", TrainSettings, "--device cuda")
    assert_was_run(with_it, saved("smollm2-entropy-advantage-settings"))
    assert_was_run(without, saved("smollm2-grpo-settings"))


def test_the_evaluation_is_the_one_that_was_run():
    [command] = settings_of("evaluate.py", EvaluationSettings)
    assert_was_run(command, saved("smollm2-arithmetic")["settings"])


def test_the_analyses_are_those_that_were_run():
    commands = settings_of("-m lab.analyze", analyze.Settings)
    reports = saved("english").values()
    assert len(commands) == len(reports)
    for command, report in zip(commands, reports):
        assert_was_run(command, report["settings"])


def test_the_effect_is_the_one_that_was_run():
    [command] = settings_of("-m lab.effect", effect.Settings)
    assert_was_run(command, saved("smollm2-effect")["smollm2"]["settings"])


def test_the_base_figures_are_those_that_were_run():
    [command] = settings_of("-m lab.real_model", real_model.Settings)
    record = saved("smollm2")
    names = ("problems", "samples", "temperature", "top_p", "max_new_tokens", "seed", "dtype")
    assert [getattr(command, name) for name in names] == [record[name] for name in names]
    assert record["device"] == "NVIDIA H200"


# Figures in the text. Each is made here, and the sentence that says it is looked for.


def interval(found, column="difference", number="+.2f"):
    low, high = found[column]["interval"]
    text = f"{found[column]['mean']:{number}} [{low:{number}}, {high:{number}}]"
    return text.replace("-", "−")


def of_temperature(report):
    """Pivotal words and reflective sentences beside their controls."""
    [pivotal] = report["controls"]["pivotal tokens"].values()
    [reflective] = report["controls"]["reflective actions"].values()
    return pivotal, reflective


@pytest.fixture(scope="module")
def reports():
    one, other = saved("english").values()
    assert (one["settings"]["temperature"], other["settings"]["temperature"]) == (1.0, 0.6)
    return one, other


def test_what_is_said_of_words_at_temperature_1(reports):
    pivotal, reflective = of_temperature(reports[0])
    text = prose()
    for control, words in {
        "other tokens": "pivotal tokens have {} nats more than all other tokens",
        "other words": "- {} to other first tokens",
        "as frequent": "- {} to words about as frequent",
        "at the same place": "- {} to words at the same place: opening",
        "as frequent, at the same place": "- {} to words as frequent and at the same place",
        "at the same place, in the same answer": "- {} to words at the same place of the same answer",
    }.items():
        assert words.format(interval(pivotal[control]["all"])) in text, control
    at_place = pivotal["at the same place"]
    for kind, words in {
        "contrastive": "Contrastive words ({} at the same place)",
        "reasoning verbs": "reasoning verbs ({}) keep",
        "causal": "causal words ({}) and",
        "sequential": "sequential ones ({}) show none",
    }.items():
        assert words.format(interval(at_place[kind])) in text, kind
    as_frequent = pivotal["as frequent, at the same place"]["causal"]
    assert f"beside words as frequent too, {interval(as_frequent)}" in text
    assert f"than one that opens with another: {interval(pivotal['openers']['all'])}" in text

    openers = pivotal["openers"]["all"]["n"] / pivotal["other tokens"]["all"]["n"]
    assert f"{100 * openers:.0f} % of them begin a sentence too" in text
    [bins] = reports[0]["comparisons"]["pivotal tokens"].values()
    quarters = [found for name, found in bins.items() if name.startswith("position")]
    assert len(quarters) == 4
    assert all(found["difference"]["interval"][0] > 0 for found in quarters)

    # "A seventh is left", "less", "none".
    left = (
        at_place["all"]["difference"]["mean"] / pivotal["other tokens"]["all"]["difference"]["mean"]
    )
    assert round(1 / left) == 7
    for kind, contains in {"contrastive": False, "causal": True, "sequential": True}.items():
        low, high = at_place[kind]["difference"]["interval"]
        assert (low < 0 < high) == contains
    assert reflective["opening words"]["all"]["difference"]["interval"][0] < 0


def test_what_is_said_of_single_words(reports):
    text = prose()
    signs = []
    for report in reports:
        [words] = report["words"].values()
        signs.append({word: found["difference"]["interval"] for word, found in words.items()})
    one, other = signs
    assert min(one["but"][0], one["so"][0]) > 0  # low ends
    assert one["therefore"][1] < 0
    assert min(other["therefore"][0], other["however"][0]) > 0
    [words] = reports[0]["words"].values()
    assert f"*therefore* is the opposite: {interval(words['therefore'])}" in text


def test_what_is_said_of_reflection(reports):
    text = prose()
    _, reflective = of_temperature(reports[0])
    shares = []
    for report in reports:
        [counts] = report["counts"].values()
        total = sum(counts["sentences"].values())
        few = total - counts["sentences"]["other"]
        shares.append(f"{few} of {total:,}")
        shares.append(f"({few / total:.1%})".replace("%", " %"))
    assert f"**Reflection is rare**: {shares[0]} sentences {shares[1]}" in text
    assert f"Reflective sentences are {shares[2]} {shares[3]}" in text
    assert f"more uncertain, {interval(reflective['other sentences']['all'])}" in text
    assert f"opens them, {interval(reflective['opening words']['all'])}" in text
    assert f"follows it, {interval(reflective['after the opening word']['all'])}" in text
    _, reflective = of_temperature(reports[1])
    assert all(found["all"]["difference"]["mean"] > 0 for found in reflective.values())


def test_what_is_said_of_the_other_temperature(reports):
    text = prose()
    pivotal, _ = of_temperature(reports[1])
    at_place = pivotal["at the same place"]
    in_answer = pivotal["at the same place, in the same answer"]
    assert f"{interval(pivotal['other tokens']['all'])} to other tokens" in text
    assert f"{interval(at_place['all'])} at the same place, {interval(in_answer['all'])} in" in text
    both = f"({interval(at_place['causal'])} and {interval(at_place['sequential'])})"
    assert f"keep a difference at the same place {both}" in text
    assert f"causal words do not ({interval(in_answer['causal'])})" in text
    assert f"than other openers: {interval(pivotal['openers']['all'])}" in text

    behaviour = []
    for report in reports:
        [figures] = report["behaviour"].values()
        behaviour.append({name: figure["mean"] for name, figure in figures.items()})
    repeated = [f"{figures['repeated 4-grams, share']:.0%}" for figures in behaviour]
    said = f"{repeated[1]} of their 4-grams were there before ({repeated[0]} at T = 1)"
    assert said.replace("%", " %") in text
    tokens = [figures["entropy per token"] for figures in behaviour]
    assert f"({tokens[0]:.2f} nats per token)" in text
    assert round(tokens[0] / tokens[1]) == 6  # "a sixth as large"


def test_at_most_so_many_answers_were_cut(reports):
    """A cut answer has a token at each of the last positions: no more of them than tokens there per
    position."""
    most = []
    for report in reports:
        [comparisons] = report["comparisons"]["pivotal tokens"].values()
        [last] = [name for name in comparisons if re.fullmatch(r"position \d+ to 255", name)]
        first = int(last.split()[1])
        tokens = comparisons[last]["n"] + comparisons[last]["n others"]
        most.append(tokens // (256 - first))
    ended = [f"{math.floor(100 * (600 - cut) / 600)} %" for cut in most]
    cut = f"at most {most[0]} of 600 at T = 1 and {most[1]} at T = 0.6"
    assert f"{cut}, so at least {ended[0]} and {ended[1]} ended by themselves" in prose()


def test_what_is_said_of_benchmark_questions():
    text = prose()
    files = saved("smollm2")["files"]
    said = []
    for result in files.values():
        assert set(result["solved"]) == {0}
        assert result["boxed"] == result["boxed_and_finished"]
        said.append(round(result["boxed"] * 1600))
    of_gsm8k = f"{said[0]} of 1,600 answers to GSM8K ({said[0] / 16:.1f} %)"
    assert f"{of_gsm8k} and {said[1]} of 1,600 to MATH500 ({said[1] / 16:.1f} %)" in text


@pytest.fixture(scope="module")
def solved():
    models = saved("smollm2-arithmetic")["models"]
    return [result["solved"] for result in models.values() if "solved" in result]


def test_what_is_said_of_passes(solved):
    text = prose()
    rates = [statistics.mean(counts) / 16 for counts in solved]
    before, with_it, without = [f"{rate:.3f}" for rate in rates]
    assert f"from {before} to {with_it}, or to {without} without the term**" in text

    always = [sum(count == 16 for count in counts) for counts in solved]
    never = [sum(count == 0 for count in counts) for counts in solved]
    between = [130 - a - n for a, n in zip(always, never)]
    lost = [sum(b > 0 == a for b, a in zip(solved[0], after)) for after in solved[1:]]
    won = [sum(a > 0 == b for b, a in zip(solved[0], after)) for after in solved[1:]]
    assert (
        f"{always[0]} of the 130 problems were solved in all 16 answers and {never[0]} in none; "
        f"after, {always[1]} and {never[1]} (without: {always[2]} and {never[2]})"
    ) in text
    assert f"were {between[0]}, and are {between[1]} ({between[2]})" in text
    assert f"{lost[0]} ({lost[1]}) that were sometimes solved never are any more" in text
    assert f"and {won[0]} ({won[1]}) the other way round" in text


def test_passes_in_the_table_are_counted_by_hand(solved, tables):
    """Pass@1 is the share of right answers, Pass@16 that of problems with one at least."""
    rows = [row.strip("| ").split(" | ") for row in tables[-4].splitlines()[2:]]
    for counts, row in zip(solved, rows):
        assert row[1].startswith(f"{sum(counts) / 16 / 130:.3f} [")
        assert row[3].startswith(f"{sum(count > 0 for count in counts) / 130:.3f} [")


def test_what_is_said_of_training(tables):
    text = prose()
    logs = {}
    for run in ("entropy-advantage", "grpo"):
        lines = unpacked(f"smollm2-{run}.jsonl.gz").splitlines()
        logs[run] = [json.loads(line) for line in lines]
        assert [line["step"] for line in logs[run]] == list(range(1, 61))
    log = logs["entropy-advantage"]
    last = statistics.mean((line["reward"] + 1) / 2 for line in log[50:])
    assert f"{100 * last:.0f} % of the answers are right in the last ten steps" in text
    assert round(60 * 32 / 273) == 7  # "seen seven times"
    right = saved("smollm2-effect")["smollm2"]["right"]
    assert f"on 32 of them ({100 * sum(right) / 32 / 16:.0f} %, below)" in text
    unmeasured = sum(line["gap_mean"] is None for line in logs["grpo"])
    assert unmeasured == 4 and "in four steps without the term it had nothing" in text
    equal = statistics.mean(line["equal_groups"] for line in log[50:])
    assert round(5 * equal) == 4  # "four problems in five"

    # A row by hand.
    ten = log[10:20]
    reward = sum(line["reward"] for line in ten) / 10
    entropy = sum(line["entropy"] for line in ten) / 10
    row = f"| with the term, 11 to 20 | {reward:+.3f} | 21.6 | {entropy:.3f} | 0.60 |"
    assert row in PAGE
    peak = max(line["peak_memory_gb"] for line in log)
    assert f"the peak was {peak:.1f}" in text

    train, test = problems()
    assert f"{len(train)} problems to train on and {len(test)} for the test" in text
    finished = saved("smollm2-arithmetic")["models"]["/tmp/smollm2"]["finished"]
    assert f"{100 * (1 - finished):.0f} % of the answers did not end within 40 tokens" in text


def test_what_is_said_of_plan_resume_and_chat():
    """Against what the programs printed."""
    output = unpacked("smollm2-output.txt.gz")
    text = prose()
    rollout, update = re.search(r"a rollout needs ([\d.]+), an update ([\d.]+)", output).groups()
    assert f"was {update} GB for an update and {rollout} for a rollout" in text
    step = re.search(r"stopped; go on from step (\d+)", output).group(1)
    assert f"went on from step {step}" in text
    [answer] = re.findall(r"'content': '(.*)'}", output)
    answer = answer.replace("\\\\", "\\")
    assert f'"{answer}"' in text


def test_what_is_said_of_the_effect():
    """From the rows of the page, which are compared above."""
    text = prose()
    shares = {}
    for block in re.split(r"^    smollm2, ", PAGE, flags=re.M)[1:]:
        head, *lines = block.splitlines()
        rows = {line[4:36].strip(): line[36:] for line in lines if line.startswith("    ")}
        name = head.partition("  ")[0]
        shares[name] = {}
        for label, row in rows.items():
            cells = re.findall(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", row)
            shares[name][label] = [[float(number) for number in cell] for cell in cells]
    assert list(shares) == ["all", "under 1/4 right", "1/4 to 1/2 right", "1/2 and more right"]

    def predicted_inside(share, label):
        _, _, projection, predicted = shares[share][label]
        return projection[1] < predicted[0] < projection[2]

    strong = [predicted_inside(share, "full strength") for share in list(shares)[1:]]
    assert all(strong)
    usual = [predicted_inside(share, "alpha 0.4") for share in shares]
    assert usual == [True, False, False, True]
    _, _, projection, predicted = shares["all"]["alpha 0.4"]
    inside = f"({predicted[0]:.3f} in [{projection[1]:.3f}, {projection[2]:.3f}])"
    assert inside in text
    for share in ("under 1/4 right", "1/4 to 1/2 right"):
        _, _, projection, predicted = shares[share]["alpha 0.4"]
        assert f"{projection[0]:.3f} [{projection[1]:.3f}, {projection[2]:.3f}]" in text
        assert f"{predicted[0]:.3f}, and" in text
    parts = []
    for share in list(shares)[1:]:
        _, _, projection, predicted = shares[share]["alpha 0.4, no baseline"]
        parts.append((projection[0] - 1) / (predicted[0] - 1))
    assert 0.48 < min(parts) and max(parts) < 0.8  # "a half to three quarters"

    turned = round(degrees(shares["all"]["alpha 0.4"][0][0]))
    alone = round(degrees(shares["all"]["alpha 0.4, no baseline"][0][0]))
    halves = round(degrees(float(re.search(r"gradients of cosine ([\d.]+)", PAGE).group(1))))
    assert f"is turned by {turned} degrees" in text
    assert f"({alone} degrees without it)" in text
    assert f"differ by {halves} degrees" in text


def degrees(cosine):
    return math.degrees(math.acos(cosine))


INTERVAL = re.compile(r"[+−\d.]+ \[[+−\d.]+, [+−\d.]+\]")


@pytest.fixture(scope="module")
def known(tables, printed_effect):
    """All that the tables and rows say."""
    return "\n".join([*tables, *printed_effect]).replace("-", "−")


def test_every_interval_in_the_text_is_one_of_the_tables(known):
    intervals = INTERVAL.findall(prose())
    assert len(intervals) >= 25
    for found in intervals:
        assert found in known, found


def test_the_figures_of_the_readme_are_those_of_the_page():
    """The page's own are held to the saved results by the tests above."""
    _, _, rest = Path("README.md").read_text().partition("## A real model in two commands")
    section, _, _ = rest.partition("## Your own model")
    # "+0.70 nats [+0.64, +0.77]" is written without its unit on the page.
    intervals = INTERVAL.findall(" ".join(section.replace(" nats [", " [").split()))
    assert len(intervals) == 6
    for found in intervals:
        assert found in " ".join(PAGE.split()), found


def test_the_untrained_model_near_greedy_is_counted_once_more():
    """By how many of the 130 problems it solved, and by problem what a trained model did."""
    untrained = saved("smollm2-greedy")
    [result] = untrained["models"].values()
    assert untrained["settings"]["temperature"] == 0.02
    assert (len(result["solved"]), result["samples"], sum(result["solved"])) == (130, 1, 85)
    assert f"| before, temperature 0.02, one answer each | {85 / 130:.3f} [" in PAGE
    trained = saved("smollm2-arithmetic")["models"]["/tmp/o/runs/ea"]
    pairs = zip(trained["solved"], result["solved"])
    gain = statistics.mean(now / trained["samples"] - before for now, before in pairs)
    assert f"with the term, temperature 1 minus that | {gain:+.3f} [" in PAGE
