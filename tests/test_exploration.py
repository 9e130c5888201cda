"""lab/exploration.py: words and sentences checked by hand, entropies against dense float64, searches that cannot explode."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from lab.exploration import (PIVOTAL, WORD, alternatives, decode_pieces, dissect_countdown, dissect_text, entropies,
                             mean_hidden, split_sentences)
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
    assert dissect_countdown("7 7 1 8 -> 23 ?", []) == dissect_text([]) == ([], [])
    dissect_countdown("7 7 1 8 -> 23 ?", "vs so wait = ? -> x 007 + +".split())     # never raises


def test_pieces_are_the_text(qwen2):
    _, tokenizer = text_model(qwen2)
    for text in ["First, é 😀 x", "\u202eab\x00</script>", "a\n\n b  c"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = decode_pieces(lambda i: tokenizer.decode(i), ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
    last = tokenizer.encode("é", add_special_tokens=False)[-1]  # the second byte of a character, which alone is no text
    assert "".join(decode_pieces(lambda i: tokenizer.decode(i), [last] * 9)) == "\ufffd" * 9
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
