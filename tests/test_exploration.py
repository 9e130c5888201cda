"""lab/analyze.py: words and sentences checked by hand, entropies against dense float64, searches that cannot explode."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from lab.analyze import (BREAK, PIVOTAL, WORD, Settings, decode_pieces, dissect_countdown, dissect_text, hidden_states, predictions,
                         read)
from model import load
from lab.pretrain import countdown_tokenizer

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


def test_words_in_disguise_are_found_and_nothing_raises():
    """Case is ignored as Unicode does: a long s is an s, a dotless i an i."""
    kinds, _ = dissect_text(WORDS.findall("\u017fo F\u0131rst SINCE x, as\na result"))
    assert kinds == [C, Q, C, "other", C, "other", "other"]


def test_sentences_end_where_a_reader_ends_them():
    text = ("We have $x = 3.$ Also, i.e. by symmetry, $y = 3.5. z$ holds. Is it so? Yes (cf. Fig. 2)!\n"
            "1. Add them.\nHence\n\\[a = b.\nc = d\\]\nfor all $n$. It costs $5. She pays $6 more.\n\n$n$ is odd.\n"
            "[asy]\ndraw((0,0)--(3.5,0));\ndot((0,3), red);\n[/asy]\n\nTherefore, done\n- first\n# Next")
    ends = [0, *(found.end() for found in BREAK.finditer(text)), len(text)]
    assert [text[a:b].strip() for a, b in zip(ends, ends[1:]) if text[a:b].strip()] == [
        "We have $x = 3.$", "Also, i.e. by symmetry, $y = 3.5. z$ holds.", "Is it so?", "Yes (cf. Fig. 2)!", "1. Add them.",
        "Hence\n\\[a = b.\nc = d\\]\nfor all $n$.", "It costs $5.", "She pays $6 more.", "$n$ is odd.",
        "[asy]\ndraw((0,0)--(3.5,0));\ndot((0,3), red);\n[/asy]", "Therefore, done", "- first", "# Next"]
    pieces = WORDS.findall(text)                                # the same sentences, in whole tokens
    assert [" ".join("".join(pieces[a:b]).split()) for a, b, _ in dissect_text(pieces)[1]][:3] == [
        "We have $x = 3.$", "Also, i.e. by symmetry, $y = 3.5. z$ holds.", "Is it so?"]


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
    for words in ("vs so wait = ? -> x 007 + +", "so so 1 2 3", "= = =", "vs vs 1 + 2", "1 + 2 = 3 + 4 = 7 + 5 = 12 + 6 = 18 + 7"):
        kinds, sentences = dissect_countdown("7 7 1 8 -> 23 ?", words.split())     # never raises; every word is somewhere
        assert len(kinds) == len(words.split()) == sentences[-1][1]
        assert all(a[1] == b[0] for a, b in zip(sentences, sentences[1:]))


def test_pieces_are_the_text(qwen2):
    _, tokenizer = text_model(qwen2)
    decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for text in ["First, é 😀 x", "\u202eab\x00</script>", "a\n\n b  c", "😀é😀😀日本語éé x", "x" * 99 + "é"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = decode_pieces(decode, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text == decode(ids)
    ids = tokenizer.encode("😀e", add_special_tokens=False)     # four bytes, a token each
    assert decode_pieces(decode, ids) == ["", "", "", "😀", "e"]
    assert decode_pieces(decode, ids[2:]) == ["", "", "\ufffd\ufffde"]     # half a character shows when the next comes
    assert decode_pieces(decode, ids[:2]) == ["", ""]           # cut by the limit
    words = countdown_tokenizer()
    assert decode_pieces(lambda i: words.decode(i), words.encode("7 * 8 = 56")) == ["7", " *", " 8", " =", " 56"]


def test_a_pivotal_word_is_its_first_token_whatever_stands_before(qwen2):
    _, tokenizer = text_model(qwen2)
    text = "é😀 日本 so. Therefore 😀é, however"
    pieces = decode_pieces(lambda i: tokenizer.decode(i), tokenizer.encode(text, add_special_tokens=False))
    kinds, _ = dissect_text(pieces)
    starts = {len("".join(pieces[:i])) + len(p) - len(p.lstrip()): kind for i, (p, kind) in enumerate(zip(pieces, kinds))
              if kind in PIVOTAL}
    assert starts == {text.index("so"): C, text.index("Therefore"): C, text.index("however"): N}


def test_entropies_and_alternatives_equal_a_dense_float64_computation(qwen2):
    folder, _ = qwen2(seed=3)
    model, _ = load(folder)
    reference = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for n in (1, 9, 20, 600):                                   # 600: more than is dealt with at a time
        ids = torch.randint(0, 112, (n,), generator=g).tolist()
        with torch.no_grad():
            entropy, likeliest, chance = predictions(model, hidden_states(model, ids), 0.7)
            p = (reference(torch.tensor([ids])).logits[0] / 0.7).softmax(-1)
        assert entropy == pytest.approx((-(p * p.log()).sum(-1)).numpy(), abs=2e-5)
        for i, q, row in zip(likeliest, chance, p.tolist(), strict=True):
            want = sorted(range(len(row)), key=lambda token: -row[token])[:3]
            assert i == want and q == pytest.approx([row[token] for token in want], abs=1e-5)


def test_sentence_vectors_are_means_over_the_sentence_read_alone(qwen2, tmp_path):
    folder, tokenizer = text_model(qwen2, max_position_embeddings=2048)
    reference = Qwen2ForCausalLM.from_pretrained(folder)
    sentences = ["Add.", "Therefore the sum of all of them is odd.", "Add."]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{i}?", "response": x}) + "\n" for i, x in enumerate(sentences)))
    with torch.no_grad():
        vectors, readings = read(str(folder), Settings(task="math", saved=str(file)))
        for text, got in zip(sentences, vectors(sentences), strict=True):
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            mean = reference.model(ids).last_hidden_state[0].mean(0)
            assert got.tolist() == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
        for r, text in zip(readings, sentences, strict=True):   # read in full: prompt, then response, shifted by one
            prompt, ids = (tokenizer.encode(x, add_special_tokens=False) for x in (r.prompt, text))
            p = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].softmax(-1)
            assert r.entropy == pytest.approx((-(p * p.log()).sum(-1)).numpy(), abs=2e-5) and r.ids == ids
            assert [q for three in r.likeliest for _, q in three] == pytest.approx(p.topk(3).values.flatten().tolist(), abs=1e-5)
