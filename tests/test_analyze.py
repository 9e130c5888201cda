"""lab/analyze.py, lab/exploration.py, lab/page.py: figures against hand, enumeration, brute force and dense fp64."""

import html.parser
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from evaluate import parse_flags
from lab.analyze import Settings, analyze, behaviour, compare, distances, nearest, permutation_p, ratio, within
from lab.exploration import (PIVOTAL, TEXT, WORD, Reading, alternatives, decode_pieces, dissect_countdown, dissect_text, entropies,
                             mean_hidden, split_sentences)
from lab.page import page, visible
from model import load
from rollout import Episode
from task import countdown_tokenizer

DATA = Path(__file__).parents[1].parent / "shared" / "data"
WORDS = re.compile(r"\s*\S+|\s+")           # a stand-in for a tokenizer: words with the space before them
C, N, Q, V = "causal", "contrastive", "sequential", "reasoning verbs"
SENTENCES = [                               # (a sentence, categories of its pivotal tokens in order, kind of reflection)
    ("Because $x$ is even, $x^2$ is even.", [C], "other"),
    ("Therefore, the area is $12$ square units.", [C], "other"),
    ("Thus $n = 7$, and hence $n + 1 = 8$.", [C, C], "other"),
    ("Since the angles add up to $180^\\circ$, the third angle is $40^\\circ$.", [C, Q], "other"),
    ("As a result, every row sums to $10$.", [C], "other"),
    ("The sum is large due to the last term, so we bound it.", [C, C], "other"),
    ("However, $k$ cannot be negative.", [N], "other"),
    ("Although the first factor is prime, the other is not.", [N, Q], "other"),
    ("This works for $n = 2$ but not for $n = 3$.", [N], "other"),
    ("On the other hand, the left side is divisible by $5$.", [N], "other"),
    ("Unless $a = b$, the line is not vertical.", [N], "other"),
    ("First, we expand the product.", [Q], "other"),
    ("Next we collect terms and then divide by $2$.", [Q, Q], "other"),
    ("Finally, add the three cases.", [Q], "other"),
    ("Recall that the diagonals of a rhombus are perpendicular.", [V], "other"),
    ("Suppose that $p$ divides $q$, which implies $p \\le q$.", [V, V], "other"),
    ("The pattern suggests a formula; we prove it by induction.", [V, V], "other"),
    ("Consider the triangle $ABC$ and note that $AB = AC$.", [V, V], "other"),
    ("The answer is $\\boxed{42}$.", [], "other"),
    ("We have $3x + 5 = 20$.", [], "other"),
    ("$a = b \\implies c = d$, the so-called switch.", [], "other"),          # a command; a longer word
    ("She sells 3 paychecks' worth of thousands of butter.", [], "other"),     # parts of words
    ("They wait 20 minutes for the bus.", [], "other"),
    ("Let's check this with $x = 4$.", [], "verify"),
    ("We verify that both roots satisfy the equation.", [], "verify"),
    ("Substituting $x = 2$ back into the equation gives $0 = 0$.", [], "verify"),
    ("Wait, I made a mistake in the second step.", [Q], "correct"),
    ("Hmm, that is wrong, because $7$ is odd.", [C], "correct"),
    ("Alternatively, use the law of cosines.", [], "start again"),
    ("That leads nowhere, so let me try again with $y$.", [C], "start again"),
]


def byte_tokenizer(folder):
    """A byte-level tokenizer with a few merges: it can write any text, and splits words and characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([s for s, _, _ in SENTENCES], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    return fast


def text_model(qwen2, **changes):
    folder, model = qwen2(vocab_size=340, tokenizer=False, **changes)
    return folder, byte_tokenizer(folder)


def test_there_are_thirty_sentences_checked_by_hand():
    assert len(SENTENCES) == 30


@pytest.mark.parametrize("sentence,pivotal,reflection", SENTENCES)
def test_sentence_checked_by_hand(sentence, pivotal, reflection):
    kinds, sentences = dissect_text(WORDS.findall(sentence))
    assert [k for k in kinds if k != "other"] == pivotal
    assert [kind for _, _, kind in sentences] == [reflection]


def test_sentences_end_where_a_reader_ends_them():
    text = ("We have $x = 3.$ Also, i.e. by symmetry, $y = 3.5. z$ holds. Is it so? Yes (cf. Fig. 2)!\n"
            "1. Add them.\nHence\n\\[a = b.\nc = d\\]\nfor all $n$. It costs $5. She pays $6 more.\n\n\\begin{align*}\n1.\n\\end{align*}Done\n")
    ends = split_sentences(text)
    assert [text[a:b].strip() for a, b in zip([0, *ends], ends) if text[a:b].strip()] == [
        "We have $x = 3.$", "Also, i.e. by symmetry, $y = 3.5. z$ holds.", "Is it so?", "Yes (cf. Fig. 2)!", "1. Add them.",
        "Hence\n\\[a = b.\nc = d\\]\nfor all $n$.", "It costs $5.", "She pays $6 more.",
        "\\begin{align*}\n1.\n\\end{align*}", "Done"]


@pytest.mark.parametrize("unit", ["$", "\\[", "$x. ", "plug a a a ", "\\begin{a}", "[asy]", "as a ", "hmm", "re-", "!?.", "\n", "a",
                                  " ", "\\", "1.", "(", "\n 1", "wait ", "$$"])
def test_no_text_makes_the_searches_explode(unit):
    text = unit * (200_000 // len(unit))
    start = time.perf_counter()
    dissect_text([text[i:i + 4] for i in range(0, len(text), 4)])
    assert time.perf_counter() - start < 10                     # an explosion would take hours


def test_real_solutions():
    file = DATA / "math500.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    solutions = [json.loads(line)["solution"] for line in file.open()]
    found = [dissect_text(WORDS.findall(text)) for text in solutions]
    count = {c: sum(kinds.count(c) for kinds, _ in found) for c in PIVOTAL}
    reflection = {c: sum(kind == c for _, x in found for _, _, kind in x) for c in ("verify", "correct", "start again", "other")}
    print(count, reflection)                                    # pytest -s
    assert min(count.values()) >= 50 and count[C] > 500 and reflection["verify"] >= 10 and reflection["other"] > 2000
    # An independent count of one word: between characters that are no letters.
    parts = [text.lower().split("therefore") for text in solutions]
    alone = sum(not (a[-1:].isalpha() or b[:1].isalpha()) for p in parts for a, b in zip(p, p[1:]))
    assert alone > 100 and sum(m.group().lower() == "therefore" for text in solutions for m in WORD.finditer(text)) == alone
    for text, (kinds, sentences) in zip(solutions, found):      # every word is in a sentence, but for lone signs
        inside = "".join("".join(WORDS.findall(text)[a:b]) for a, b, _ in sentences)
        assert sorted(c for c in inside if c.isalnum()) == sorted(c for c in text if c.isalnum())


def test_countdown_is_taken_apart():
    words = "7 * 8 = 56 / 1 = 56 + 7 = 63 vs 23 wait 1 + 8 = 9 + x so".split()
    kinds, sentences = dissect_countdown("7 7 1 8 -> 23 ?", words)
    assert kinds == ["operand", "operator", "operand", "=", "result", "operator", "operand", "=", "result", "operator",
                     "last operand", "=", "result", "vs", "target", "wait", "operand", "operator", "operand", "=", "result",
                     "operator", "malformed", "so"]
    assert kinds[18] == "operand"                               # after 1: 7, 7 and 8 are left
    assert sentences == [(0, 13, "first attempt"), (13, 15, "check"), (15, 16, "wait"), (16, 23, "attempt after wait"), (23, 24, "so")]
    twins, _ = dissect_countdown("7 7 1 8 -> 23 ?", "1 + 8 = 9 + 7 = 16 + 7 = 23".split())
    assert twins[6] == twins[10] == "last operand"              # two sevens are left: no choice
    assert dissect_countdown("7 7 1 8 -> 23 ?", []) == ([], [])
    dissect_countdown("7 7 1 8 -> 23 ?", "vs so wait = ? -> x 007 + +".split())     # never raises


def test_pieces_are_the_text(qwen2):
    _, tokenizer = text_model(qwen2)
    for text in ["First, é 😀 x", "\u202eab\x00</script>", "a\n\n b  c"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = decode_pieces(lambda i: tokenizer.decode(i), ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
    assert "".join(decode_pieces(lambda i: tokenizer.decode(i), [200] * 9)).count("\ufffd") == 9     # bytes that are no text
    words = countdown_tokenizer()
    ids = words.encode("7 * 8 = 56", add_special_tokens=False)
    assert decode_pieces(lambda i: words.decode(i), ids) == ["7", " *", " 8", " =", " 56"]


def test_entropies_and_alternatives_equal_a_dense_float64_computation(qwen2):
    folder, reference = qwen2(seed=3)
    model, _ = load(folder)
    reference = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 112, (n,), generator=g)
    none = torch.zeros(0)
    episodes = [Episode(draw(p), draw(r), none, none, True, 0) for p, r in ((3, 9), (7, 1), (1, 20), (2, 0))]
    for e, got in zip(episodes, entropies(model, episodes, 0.7)):
        z = reference(torch.cat((e.prompt, e.response))[None]).logits[0, len(e.prompt) - 1:-1] / 0.7
        p = z.softmax(-1)
        assert got == pytest.approx((-(p * p.log()).sum(-1)).detach().numpy(), abs=2e-5)
        likeliest = [sorted(enumerate(row.tolist()), key=lambda pair: -pair[1])[:3] for row in p]
        for ours, theirs in zip(alternatives(model, lambda i: i[0], e, 0.7), likeliest, strict=True):
            assert [i for i, _ in ours] == [i for i, _ in theirs]
            assert [q for _, q in ours] == pytest.approx([q for _, q in theirs], abs=1e-5)


def test_sentence_vectors_are_means_over_the_true_length(qwen2):
    folder, tokenizer = text_model(qwen2)
    model, _ = load(folder)
    sentences = ["Add.", "Therefore the sum of all of them is odd."]
    for text, got in zip(sentences, mean_hidden(model, tokenizer, sentences)):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        alone = model(ids, torch.arange(ids.shape[1])[None])[0].mean(0)
        assert got.tolist() == pytest.approx((alone / alone.norm()).tolist(), abs=1e-5)


def test_nearest_equals_brute_force():
    a, b = (torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (300, 40))
    for k, got in ((5, nearest(a, b)), (1, nearest(a, b, 1)), (40, nearest(a, b, 99))):
        want = [sum(sorted(sum((x - y) ** 2 for x, y in zip(u, v)) ** 0.5 for v in b.tolist())[:k]) / k for u in a[:20].tolist()]
        assert got[:20].tolist() == pytest.approx(want, abs=1e-7)


def reading(text, entropy=None, sentences=None, kinds=None, problem=0, difficulty=1.0):
    pieces = WORDS.findall(text)
    own = dissect_text(pieces)
    return Reading(problem, "p", [hash(p) for p in pieces], pieces, kinds or own[0], own[1] if sentences is None else sentences,
                   np.array(entropy or [1.0] * len(pieces)), difficulty)


def test_distances_count_every_sentence_and_read_each_once():
    seen, place = [], {"A.": 0.0, "B.": 1.0, "C.": 10.0}
    def vectors(sentences):
        seen.extend(sentences)
        return [[place[s]] for s in sentences]
    got = distances(vectors, [reading("C. A. C.")], [reading("A. A. B."), reading("B. B. B.")])
    assert sorted(seen) == ["A.", "B.", "C."]
    assert got == pytest.approx([(9 * 4 + 10) / 5, (0 + 0 + 1 + 1 + 1) / 5, (9 * 4 + 10) / 5])


def by_enumeration(values, label, group):
    """Every arrangement of the labels within the groups, the difference of means of each."""
    values, label, group = map(np.array, (values, label, group))
    choices = [[(members, c) for c in itertools.combinations(members, label[members].sum())]
               for members in (np.flatnonzero(group == g) for g in np.unique(group))]
    difference = lambda l: values[l].mean() - values[~l].mean()
    every = []
    for arrangement in itertools.product(*choices):
        l = np.zeros(len(values), dtype=bool)
        l[[i for _, c in arrangement for i in c]] = True
        every.append(difference(l))
    centre = np.mean(every)
    return np.mean(np.abs(np.array(every) - centre) >= abs(difference(label) - centre) - 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_permutation_test_equals_full_enumeration(seed):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 3, 9)
    label = rng.random(9) < 0.4
    label[np.flatnonzero(group == group[0])[0]] = True
    values = rng.integers(0, 4, 9) + 1.0 * label                # ties, which must count as extreme
    if not any(0 < label[group == g].sum() < (group == g).sum() for g in range(3)):
        return
    want = by_enumeration(values, label, group)
    assert permutation_p(values, label, group, 10 ** 6) == pytest.approx(want)


def test_random_permutations_come_close_to_enumeration_and_stay_within_groups():
    rng = np.random.default_rng(1)
    group, label = np.repeat([0, 1], 7), np.tile([True, True, False, False, True, False, False], 2)
    values = rng.normal(size=14) + 0.8 * label                  # 35 * 35 = 1225 arrangements
    assert permutation_p(values, label, group, 1224) == pytest.approx(by_enumeration(values, label, group), abs=0.05)
    # A difference between groups alone is none within them.
    group, values = np.repeat([0, 1], 50), np.repeat([0.0, 5.0], 50)
    label = np.r_[np.arange(50) < 5, np.arange(50) < 45]
    assert permutation_p(values, label, group, 200) == 1.0
    assert np.isnan(permutation_p(values, group == 0, group, 200))


def test_comparison_by_hand():
    values, label, group = np.array([1.0, 3.0, 2.0, 0.0, 4.0, 2.0]), np.array([1, 1, 0, 0, 1, 0], dtype=bool), np.array([0, 0, 0, 1, 1, 1])
    got = compare(values, label, group)
    one, other = values[label], values[~label]                  # 1 3 4 and 2 0 2
    assert got["mean"]["mean"] == pytest.approx(8 / 3) and got["others"]["mean"] == pytest.approx(4 / 3)
    assert got["difference"]["mean"] == pytest.approx(4 / 3) and (got["n"], got["n others"]) == (3, 3)
    assert got["d"]["mean"] == pytest.approx(4 / 3 / np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2))
    assert got["p"] == pytest.approx(by_enumeration(values, label, group))
    assert compare(values, np.arange(6) == 0, group) is None    # one alone has no spread


def test_intervals_are_over_responses():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 50)
    values = rng.normal(size=40)[group] + 0.01 * rng.normal(size=2000)     # tokens of a response say the same
    got = compare(values, np.arange(2000) % 2 == 0, group)
    low, high = got["mean"]["interval"]
    assert high - low == pytest.approx(2 * 1.96 * np.std([values[group == g].mean() for g in range(40)]) / np.sqrt(40), rel=0.15)
    low, high = got["difference"]["interval"]                   # both kinds in every response: what they share cancels
    assert high - low < 0.01
    r = ratio([2.0, 4.0, 6.0], [1, 2, 1])
    assert r["mean"] == 3.0 and 2.0 <= r["interval"][0] < 3.0 < r["interval"][1] <= 6.0
    assert np.isnan(ratio([0, 0], [0, 0])["mean"])


def test_a_confounder_is_seen_within_its_bins():
    position = np.tile(np.arange(20), 30)
    group, rng = np.repeat(np.arange(30), 20), np.random.default_rng(0)
    values = (position < 10) + 0.1 * rng.normal(size=600)       # only the position matters ...
    label = rng.random(600) < np.where(position < 10, 0.8, 0.2)     # ... and labels prefer the front
    assert compare(values, label, group)["difference"]["mean"] > 0.5
    bins = within(values, label, group, position)
    assert list(bins) == ["0 to 4", "5 to 9", "10 to 14", "15 to 19"]
    assert all(abs(c["difference"]["mean"]) < 0.06 for c in bins.values())
    kinds = within(values, label, group, np.where(position < 10, "front", "back"))
    assert list(kinds) == ["back", "front"] and kinds["front"]["mean"]["mean"] == pytest.approx(values[label & (position < 10)].mean())


def test_behaviour_by_hand():
    a = reading("So a b c d. So a b c d. Wait, check.", [2.0] + [0.0] * 5 + [4.0] + [0.0] * 3 + [1.0, 3.0])
    a = Reading(**{**vars(a), "ids": [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7]})
    got = behaviour([a], "text")
    assert [round(f["mean"], 6) for f in got.values()] == [12, round(2 / 9, 6), 2, round(200 / 12, 6), 1, round(10 / 12, 6),
                                                          1, 2]


class Parsed(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, and its text."""
    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.elements, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\" onmouseover=\"alert(1)", "'&amp;", "\x00\x1b[31m",
           "\u202eabc", "\u200b\u2066", "\ud800", "\n", "א", "]]>-->", "x" * 100_000]


def hostile_reading():
    r = reading("a")
    return Reading(**{**vars(r), "prompt": "".join(HOSTILE), "pieces": HOSTILE, "kinds": ["causal"] + ["other"] * 11,
                      "sentences": [(0, 2, "verify")], "entropy": np.linspace(0, 2, 12),
                      "alternatives": [[(t, 0.5), ("b", 0.3), ("c", 0.2)] for t in HOSTILE]})


def test_page_keeps_hostile_text_as_text():
    source = page([{"</h3><script>": hostile_reading()}], TEXT)
    source.encode("utf-8")                                      # no lone surrogates
    parsed = Parsed(source)
    assert {tag for tag, _ in parsed.elements} == {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span"}
    assert {name for _, attributes in parsed.elements for name in attributes} == {
        "lang", "charset", "http-equiv", "content", "class", "style", "data-h", "dir"}
    assert "url(" not in source and "http:" not in source and "https:" not in source
    assert not set(source) & {"\x00", "\x1b", "\u202e", "\u200b", "\u2066"} and len(source) < 30_000
    for shown in ("</script><script>alert(1)</script>", "⟨U+0000⟩⟨U+001B⟩[31m", "⟨U+202E⟩abc", "⟨U+D800⟩", "⏎\n",
                  "⟨99,800 more characters⟩"):
        assert shown in parsed.text
    tokens = [a for tag, a in parsed.elements if tag == "span" and "data-h" in a]
    assert [a["class"] for a in tokens[:3]] == ["t p r", "t r", "t"] and len(tokens) == 12
    assert tokens[0]["data-h"].split("\n") == ["0.000 nats, token 1", "causal; sentence: verify",
                                               " 50.00%  </script><script>alert(1)</script>", " 30.00%  b", " 20.00%  c"]
    assert tokens[0]["style"].endswith(",0.00)") and tokens[11]["style"].endswith(",1.00)")


def test_countdown_report(tmp_path, capsys, qwen2):
    folder, _ = qwen2(seed=1)
    s = parse_flags(Settings, "x", [str(folder), "--base", "base", "--problems", "6", "--samples", "4", "--max-new-tokens", "60",
                                    "--out", str(tmp_path / "out")])
    analyze(s)
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    base = report["models"]["base"]
    assert list(report["models"]) == ["base", str(folder)] and base["pivotal tokens"]["all"]["difference"]["interval"][0] > 0.5
    assert base["pivotal tokens"]["kinds"]["="]["mean"] < 0.01 < 0.5 < base["pivotal tokens"]["kinds"]["operand"]["mean"]
    assert base["pivotal tokens"]["all"]["p"] == pytest.approx(1 / 1001) and "rare behaviours" not in base
    assert {"position", "difficulty"} <= set(base["reflective actions"]["within"])
    assert "base: pivotal tokens" in printed and "\x1b" not in printed
    parsed = Parsed((tmp_path / "out" / "responses.html").read_text())
    assert sum(tag == "h3" for tag, _ in parsed.elements) == 6              # three problems, two models
    matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")
    image = matplotlib.image.imread(tmp_path / "out" / "entropy.png")
    assert np.ptp(image[..., :3], axis=-1).max() < 0.05 and 0.02 < (image[..., :3].mean(-1) < 0.9).mean() < 0.6


def test_text_is_read_or_sampled_from_a_file(tmp_path, qwen2):
    folder, _ = text_model(qwen2, max_position_embeddings=2048)
    lines = [{"problem": f"What is {i} + 1?", "level": 1 + i % 3, "solution": " ".join(s for s, _, _ in SENTENCES[i::6])} for i in range(6)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    s = Settings(models=(str(folder),), base=str(folder), task="text", texts=str(file), out=str(tmp_path / "out"), samples=2)
    record = analyze(s)["models"][str(folder)]
    want = {c: sum(p.count(c) for _, p, _ in SENTENCES) for c in PIVOTAL}
    assert {c: record["pivotal tokens"]["kinds"][c]["n"] for c in want} == want        # byte-level tokens, the same words
    assert record["reflective actions"]["kinds"]["verify"]["n"] == 3
    assert set(record["pivotal tokens"]["within"]) == {"position", "difficulty", "place in the word"}
    import dataclasses
    sampled = analyze(dataclasses.replace(s, resample=True, problems=3, max_new_tokens=40))
    assert sampled["models"][str(folder)]["behaviour"]["tokens per response"]["n"] == 6


@pytest.mark.parametrize("changes,message", [
    (dict(models=("nowhere/at/all",)), "no model folder"), (dict(samples=0), "at least 1"), (dict(temperature=0.0), "0.001"),
    (dict(task="text"), "--texts FILE"), (dict(texts="missing.jsonl"), "missing.jsonl"), (dict(encoder="x"), "pip install"),
    (dict(texts="[1]"), "line 1, holds no JSON object"), (dict(texts='{"answer": "a"}'), "has no problem"), (dict(texts=""), None),
    (dict(texts='{"problem": "Add 1."}'), "no countdown prompt"), (dict(texts='{"problem": "Add."}', task="text"), "has no words")])
def test_bad_input_is_one_sentence(tmp_path, changes, message):
    if changes.get("texts", "")[:1] in ("[", "{"):
        (tmp_path / "x.jsonl").write_text(changes["texts"])
        changes = changes | {"texts": str(tmp_path / "x.jsonl")}
    s = Settings(**{"models": ("base",), "problems": 1, "samples": 1, "max_new_tokens": 4, "out": str(tmp_path / "o")} | changes)
    if message is None:
        analyze(s)                                              # the smallest run there is
        return
    if "encoder" in changes:
        try:
            import sentence_transformers                        # noqa: F401
            pytest.skip("sentence-transformers is installed")
        except ImportError:
            pass
    with pytest.raises((ValueError, OSError), match=message) as error:
        analyze(s)
    assert "\n" not in str(error.value)
