"""lab/reading.py: the text of tokens against the tokenizer's, entropies and sentence vectors against
transformers' model in dense float64 and float32."""

import json

import pytest
import torch
from readings import C, N, text_model
from transformers import Qwen2ForCausalLM

from lab.analyze import Settings
from lab.exploration import PIVOTAL, dissect_text
from lab.pretrain import countdown_tokenizer
from lab.reading import decode_pieces, hidden_states, predictions, read_responses
from model import load


@pytest.fixture
def tokenizer(qwen2):
    """Byte by byte: most characters beyond ASCII are several tokens."""
    _, tokenizer = text_model(qwen2)
    return tokenizer


def decoder(tokenizer):
    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    return decode


@pytest.mark.parametrize(
    "text",
    [
        "First, é 😀 x",
        "\u202eab\x00</script>",
        "a\n\n b  c",
        "😀é😀😀日本語éé x",
        "x" * 99 + "é",
    ],
)
def test_pieces_are_the_text(tokenizer, text):
    decode = decoder(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = decode_pieces(decode, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text == decode(ids)


def test_a_character_of_several_tokens_is_the_piece_of_its_last(tokenizer):
    decode = decoder(tokenizer)
    ids = tokenizer.encode("😀e", add_special_tokens=False)  # four bytes, a token each
    assert decode_pieces(decode, ids) == ["", "", "", "😀", "e"]
    # Half a character shows when the next comes.
    assert decode_pieces(decode, ids[2:]) == ["", "", "\ufffd\ufffde"]
    assert decode_pieces(decode, ids[:2]) == ["", ""]  # cut by the limit


def test_pieces_of_countdown_are_words_with_the_space_before_them():
    words = countdown_tokenizer()
    ids = words.encode("7 * 8 = 56")
    assert decode_pieces(lambda i: words.decode(i), ids) == ["7", " *", " 8", " =", " 56"]


def test_a_pivotal_word_is_its_first_token_whatever_stands_before(tokenizer):
    text = "é😀 日本 so. Therefore 😀é, however"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = decode_pieces(lambda i: tokenizer.decode(i), ids)
    kinds, _ = dissect_text(pieces)
    starts = {}
    for i, (piece, kind) in enumerate(zip(pieces, kinds)):
        if kind in PIVOTAL:
            space = len(piece) - len(piece.lstrip())
            starts[len("".join(pieces[:i])) + space] = kind
    assert starts == {text.index("so"): C, text.index("Therefore"): C, text.index("however"): N}


def test_entropies_and_alternatives_equal_a_dense_float64_computation(qwen2):
    folder, _ = qwen2(seed=3)
    model, _ = load(folder)
    reference = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 9, 20, 600):  # 600: more than is dealt with at a time
        ids = torch.randint(0, 112, (count,), generator=generator).tolist()
        with torch.no_grad():
            entropy, likeliest, chances = predictions(model, hidden_states(model, ids), 0.7)
            p = (reference(torch.tensor([ids])).logits[0] / 0.7).softmax(-1)
        assert entropy == pytest.approx((-(p * p.log()).sum(-1)).numpy(), abs=2e-5)
        for three, chance, row in zip(likeliest, chances, p.tolist(), strict=True):
            want = sorted(range(len(row)), key=lambda token: -row[token])[:3]
            assert three == want
            assert chance == pytest.approx([row[token] for token in want], abs=1e-5)


SAVED = ["Add.", "Therefore the sum of all of them is odd.", "Add."]


@pytest.fixture
def saved_responses(qwen2, tmp_path):
    """Three saved responses, read -> vectors, readings, tokenizer, transformers' model."""
    folder, tokenizer = text_model(qwen2, max_position_embeddings=2048)
    rows = [{"problem": f"{i}?", "response": text} for i, text in enumerate(SAVED)]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with torch.no_grad():
        settings = Settings(task="math", saved=str(file))
        vectors, readings = read_responses(str(folder), settings)
        yield vectors, readings, tokenizer, Qwen2ForCausalLM.from_pretrained(folder)


def test_sentence_vectors_are_means_over_the_sentence_read_alone(saved_responses):
    vectors, _, tokenizer, reference = saved_responses
    for text, got in zip(SAVED, vectors(SAVED), strict=True):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        mean = reference.model(ids).last_hidden_state[0].mean(0)
        assert got.tolist() == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)


def test_a_response_is_read_behind_its_prompt(saved_responses):
    """In full: prompt, then response, shifted by one."""
    _, readings, tokenizer, reference = saved_responses
    for reading, text in zip(readings, SAVED, strict=True):
        prompt = tokenizer.encode(reading.prompt, add_special_tokens=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        p = logits.softmax(-1)
        assert reading.ids == ids
        assert reading.entropy == pytest.approx((-(p * p.log()).sum(-1)).numpy(), abs=2e-5)
        chances = [chance for three in reading.likeliest for _, chance in three]
        assert chances == pytest.approx(p.topk(3).values.flatten().tolist(), abs=1e-5)
