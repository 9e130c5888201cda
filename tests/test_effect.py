"""lab/effect.py and lab/gradients.py: the gradient against train.update's own (an SGD step), figures
against gradients made by hand and numpy, and the published rows against the saved products.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

import lab.effect as lab_effect
import lab.gradients as gradients
from lab.effect import Settings, effect, measure, read
from lab.effect_report import BANDS, FIGURES, Measured, cells, tables
from lab.gradients import PARTS, Group, all_gradients, fold, pack, part_of, products, unpack
from lab.multiplier import (
    entropy_advantage,
    full_strength,
    multiplier,
    multiplier_of_groups,
    plain,
    two_advantages,
    without_baseline,
)
from model import load
from plumbing.batch import pad_responses
from plumbing.optimizer import make_optimizer
from plumbing.settings import Settings as TrainSettings
from plumbing.settings import parse_flags
from readings import text_model
from train import update

SAVED = "lab/results/effect.json.gz"
SAVED_MORE = "lab/results/effect-768.json.gz"
EVERY_TOKEN = (-float("inf"), float("inf"))
TINY = dict(problems=6, samples=8, max_new_tokens=40)


@pytest.fixture(scope="module")
def base():
    return load("base")


@pytest.fixture(scope="module")
def groups(base):
    """Six problems of eight answers; half of the answers of each are called right."""
    found, _ = lab_effect.sample_groups(*base, Settings(**TINY))
    half = torch.tensor(0.5)
    positive, negative = two_advantages(half, 8)
    of_answer = torch.where(torch.arange(8) % 2 == 0, positive, negative)
    called = []
    for group in found:
        _, counted = pad_responses([episode.logp for episode in group.episodes])
        called.append(Group(group.episodes, of_answer[:, None] * counted, half))
    return called


# The gradient.


@pytest.mark.parametrize("alpha", [0.0, 0.4, 3.0])
def test_the_gradient_is_the_one_that_an_update_steps_along(alpha, groups):
    """An SGD step of learning rate 1 on the same answers, before and after."""
    model, _ = load("base")
    compared = {"shaped": entropy_advantage(alpha, 2.0)}
    found = all_gradients(model, [[group] for group in groups], compared, EVERY_TOKEN, 1.0)

    episodes = [episode for group in groups for episode in group.episodes]
    tokens = sum(len(episode.response) for episode in episodes)
    old_logp, counted = pad_responses([episode.logp for episode in episodes])
    of_answers = torch.cat([group.advantage[:, 0] for group in groups])
    advantage = of_answers[:, None] * counted
    s = TrainSettings(alpha=alpha, grad_clip=1e9)
    make_optimizer(model, 0.0, s)  # makes the gradients that update expects
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update(model, optimizer, episodes, old_logp, advantage, s)

    for part in PARTS:
        steps = []
        for name, parameter in model.named_parameters():
            if part_of(name) == part:
                steps.append((before[name] - parameter.detach()).flatten())
        ours = found[part][0].sum(dim=0) / tokens
        theirs = torch.cat(steps)
        assert theirs.norm() > 1e-4
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_the_bands_of_entropy_add_up_to_all_tokens(base, groups):
    model, _ = base
    compared = {"plain": plain, "full": full_strength(2.0)}
    whole = all_gradients(model, [groups[:2]], compared, EVERY_TOKEN, 1.0)
    bands = [all_gradients(model, [groups[:2]], compared, band, 1.0) for band in BANDS.values()]
    for part in PARTS:
        total = sum(found[part] for found in bands)
        assert torch.allclose(total, whole[part], rtol=1e-3, atol=1e-4)


def test_a_block_is_the_sum_of_its_problems(base, groups):
    model, _ = base
    compared = {"alpha": entropy_advantage(0.4, 2.0)}
    together = all_gradients(model, [groups[:2]], compared, EVERY_TOKEN, 1.0)
    apart = all_gradients(model, [groups[:1], groups[1:2]], compared, EVERY_TOKEN, 1.0)
    for part in PARTS:
        assert together[part].shape[1] == 1
        assert torch.allclose(together[part][:, 0], apart[part].sum(dim=1), rtol=1e-4, atol=1e-5)

    sums = lab_effect.predictions([groups[:2]], compared, EVERY_TOKEN)
    sums_apart = lab_effect.predictions([groups[:1], groups[1:2]], compared, EVERY_TOKEN)
    assert sums["weight"] == pytest.approx([sum(sums_apart["weight"])])


def test_full_strength_is_what_a_very_large_alpha_does(base, groups):
    model, _ = base
    compared = {"full": full_strength(2.0), "large": entropy_advantage(1e4, 2.0)}
    found = all_gradients(model, [groups[:1]], compared, EVERY_TOKEN, 1.0)
    for full, large in found.values():
        assert (full - large).norm() < 0.01 * full.norm()


def test_every_parameter_has_a_part(base):
    model, _ = base
    names = [name for name, _ in model.named_parameters()]
    assert {part_of(name) for name in names} == set(PARTS)
    assert part_of("layers.0.self_attn.q_norm.weight") == "attention"
    assert [name for name in names if part_of(name) == "norms"][-1] == "norm.weight"


def test_folding_keeps_inner_products(monkeypatch):
    random = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, generator=random)
    b = a + torch.randn(200_000, generator=random)
    assert fold(a) is a  # there is room
    monkeypatch.setattr(gradients, "ROOM", 20_001)
    assert len(fold(a)) == 20_001
    tolerance = 4 * float(a.norm() * b.norm()) / 20_001**0.5
    for x, y in ((a, a), (a, b), (b, b)):
        assert float(fold(x) @ fold(y)) == pytest.approx(float(x @ y), abs=tolerance)
    assert torch.allclose(fold(a) + fold(b), fold(a + b), atol=1e-4)


def test_a_packed_matrix_comes_back():
    matrices = np.random.default_rng(0).normal(size=(3, 7, 7))
    matrices = matrices + matrices.transpose(0, 2, 1)
    matrices[2] = 0
    packed = json.loads(json.dumps(pack(matrices)))
    assert np.abs(unpack(packed, 7) - matrices).max() <= np.abs(matrices).max() / 60_000 * 1.001


# Figures.

VECTORS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))  # shapings, groups, 4


def record_of(vectors, right, samples=8):
    """A record of gradients made by hand, all in one part and one band, of problems with these
    numbers right."""
    blocks = [[i] for i, count in enumerate(right) if 0 < count < samples]
    size = len(blocks)
    nothing = products(torch.zeros(len(vectors), size, 1))
    of_label = {label: nothing for label in (*BANDS, *PARTS)}
    of_label["MLP"] = of_label["H 0.5 to 1"] = products(vectors)
    ones = [1.0] * size
    zeros = [0.0] * size
    sums = {}
    for band in BANDS:
        some = ones if band == "H 0.5 to 1" else zeros
        sums[band] = dict.fromkeys(("tokens", "weight", "weight H"), some)
        factors = np.outer(range(1, 1 + len(vectors)), some)
        sums[band]["weight M"] = factors.tolist()
    packed = {}
    for label, both in of_label.items():
        packed[label] = {kind: pack(matrices) for kind, matrices in both.items()}
    s = Settings(models=("hand",), samples=samples, problems=len(right))
    return {
        "settings": vars(s),
        "shapings": ["plain", *map(str, range(1, len(vectors)))],
        "right": right,
        "blocks": blocks,
        "sums": sums,
        "products": packed,
    }


def figures_by_hand(vectors, shaping, problems):
    """From the gradients themselves; `problems` in all, the others' gradients are 0."""
    padded = np.zeros((2, problems, vectors.shape[2]))
    padded[0, : vectors.shape[1]] = vectors[0]
    padded[1, : vectors.shape[1]] = vectors[shaping]
    expected = np.zeros((2, 2))
    for i, j in itertools.permutations(range(problems), 2):
        expected += padded[:, i] @ padded[:, j].T

    plain_sum, changed_sum = padded.sum(axis=1)
    product = plain_sum @ changed_sum
    plain_length = np.linalg.norm(plain_sum)
    changed_length = np.linalg.norm(changed_sum)
    plain_variance, changed_variance = padded.var(axis=1).sum(axis=1)
    ratio = changed_variance / plain_variance
    return {
        "cosine": product / plain_length / changed_length,
        "length": changed_length / plain_length,
        "projection": product / plain_length**2,
        "M predicts": shaping + 1,
        "expected projection": (expected[0, 1] + expected[1, 0]) / 2 / expected[0, 0],
        "variance": ratio,
        "noise": ratio * expected[0, 0] / expected[1, 1],
    }


@pytest.mark.parametrize("label", ["all", "MLP", "H 0.5 to 1"])
def test_figures_are_those_of_the_gradients(label):
    """Of seven problems two have equal answers, and no gradient."""
    measured = Measured(record_of(VECTORS, right=[1, 2, 3, 4, 5, 0, 8]))
    for shaping in (1, 2):
        row = measured.row(shaping, label, "all")
        want = figures_by_hand(VECTORS, shaping, problems=7)
        assert {name: row[name]["mean"] for name in FIGURES} == pytest.approx(want, rel=2e-3)


def test_figures_of_a_share_are_those_of_its_problems():
    measured = Measured(record_of(VECTORS, right=[1, 2, 3, 4, 5, 0, 8]))
    row = measured.row(1, "all", "1/4 to 1/2 right")  # 2 and 3 of 8
    want = figures_by_hand(VECTORS[:, 1:3], 1, problems=2)
    for name in FIGURES[:5]:
        assert row[name]["mean"] == pytest.approx(want[name], rel=2e-3)


def test_a_known_cosine():
    """Gradients (1, 0) and (1, 1), of each of six problems: a cosine of sqrt(1/2), without noise."""
    vectors = torch.tensor([[[1.0, 0.0]] * 6, [[1.0, 1.0]] * 6])
    measured = Measured(record_of(vectors, right=[1, 2, 3, 4, 5, 6]))
    row = measured.row(1, "all", "all")
    for name, want in {
        "cosine": 0.5**0.5,
        "length": 2**0.5,
        "projection": 1,
        "expected projection": 1,
    }.items():
        assert row[name]["mean"] == pytest.approx(want, rel=1e-4)
        assert row[name]["interval"] == pytest.approx([want, want], rel=1e-4)
    assert measured.halves()[0] == pytest.approx(1, rel=1e-4)


def test_problems_that_pull_apart_are_seen():
    """Hard problems along (1, 0), easy ones along (-1, 1)."""
    vectors = torch.tensor([[[1.0, 0.0]] * 3 + [[-1.0, 1.0]] * 3] * 2)
    measured = Measured(record_of(vectors, right=[1, 1, 1, 6, 6, 6]))
    found = measured.between_shares("under 1/4 right", "1/2 and more right")
    assert found["mean"] == pytest.approx(-(0.5**0.5), rel=1e-3)
    assert found["interval"] == pytest.approx([-(0.5**0.5)] * 2, rel=1e-3)


def test_halves_of_pure_noise_have_nothing_in_common():
    vectors = torch.randn(2, 200, 400, generator=torch.Generator().manual_seed(1))
    mean, (low, high) = Measured(record_of(vectors, right=[1] * 200)).halves()
    assert low < mean < high
    assert abs(mean) < 0.1


def test_an_interval_covers_the_figure_of_all_problems():
    """Two hundred samples of 40 problems: the 95 % interval of the expected projection, which is
    0.8, holds it about as often."""
    random = torch.Generator().manual_seed(2)
    inside = 0
    for _ in range(60):
        signal = torch.tensor([1.0, 0.0, 0.0])
        plain_vectors = signal + torch.randn(40, 3, generator=random)
        changed = 0.8 * signal + torch.randn(40, 3, generator=random)
        record = record_of(torch.stack([plain_vectors, changed]), right=[1] * 40)
        low, high = Measured(record).row(1, "all", "all")["expected projection"]["interval"]
        inside += int(low < 0.8 < high)
    assert 50 <= inside <= 60


def test_a_prediction_weighs_tokens_by_what_they_can_pull(groups):
    """By hand, token by token, for the first group."""
    shaping = entropy_advantage(0.4, 2.0)
    band = BANDS["H of 1 and more"]
    sums = lab_effect.predictions([groups[:1]], {"plain": plain, "alpha": shaping}, band)
    weights = []
    factors = []
    for episode, advantage in zip(groups[0].episodes, groups[0].advantage[:, 0]):
        for logp, entropy in zip(episode.logp, episode.entropy):
            if entropy >= 1:
                weights.append(float((advantage * (1 - logp.exp())) ** 2))
                factors.append(float(multiplier(shaping, torch.tensor(0.5), entropy, 8)))
    assert sums["tokens"] == [len(weights)]
    assert sums["weight"][0] == pytest.approx(sum(weights), rel=1e-4)
    assert sums["weight M"][0][0] == pytest.approx(sum(weights), rel=1e-4)
    assert sums["weight M"][1][0] == pytest.approx(np.dot(weights, factors), rel=1e-4)


def test_without_its_baseline_a_shaping_is_a_factor_on_tokens():
    """What is left out is the same for right and wrong answers; where all are equal, A stays 0."""
    shaping = without_baseline(entropy_advantage(0.4, 2.0), 8)
    advantage = torch.tensor([2.0, -0.5, 0.0])
    entropy = torch.tensor([1.0, 1.0, 1.0])
    m = float(multiplier(entropy_advantage(0.4, 2.0), torch.tensor(0.125), entropy[0], 8))
    shaped = shaping(advantage, entropy, torch.tensor(0.125))
    assert shaped.tolist() == pytest.approx([2 * m, -0.5 * m, 0.0])
    of_equals = shaping(torch.zeros(3), entropy, torch.tensor(0.0))
    assert of_equals.tolist() == [0.0, 0.0, 0.0]


# The command.


def test_the_command_saves_what_it_prints_and_draws_it(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    file = tmp_path / "effect.json.gz"
    picture = tmp_path / "effect.png"
    effect(Settings(models=("base",), problems=10, samples=8, json=str(file), figure=str(picture)))
    printed = capsys.readouterr().out
    assert printed.startswith("base: countdown, 10 problems × 8 answers")
    assert picture.stat().st_size > 10_000
    effect(Settings(again=str(file)))
    assert capsys.readouterr().out == printed
    for shaping in ("alpha 0.4", "alpha 2", "full strength", "difficulty weight"):
        assert f"\n{shaping} " in printed


def test_mathematics_and_an_untied_model(qwen2, tmp_path, monkeypatch):
    """A random model, whose answers are called right if they have an even number of characters."""

    def is_even(task, problem, response, finished):
        return 1.0 if len(response) % 2 == 0 else -1.0

    monkeypatch.setattr("tasks.mathematics.Math.reward", is_even)
    folder, _ = text_model(qwen2, family=Qwen3Config, tie_word_embeddings=False)
    rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(40)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = Settings(task="math", data=str(data), problems=5, samples=6, max_new_tokens=12)
    record = measure(str(folder), s)
    row = Measured(record).row(1, "all", "all")
    assert 0.5 < row["cosine"]["mean"] < 1
    assert len(record["blocks"]) >= 3


def test_the_command_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="either models to measure or --again"):
        effect(Settings())
    with pytest.raises(ValueError, match="--kappa must be greater than 1"):
        effect(Settings(models=("base",), kappa=1.0))
    with pytest.raises(FileNotFoundError, match="a folder that does not exist"):
        effect(Settings(models=("base",), json=str(tmp_path / "no" / "file.json.gz")))
    with pytest.raises(ValueError, match="only 0 of 2 problems had right and wrong answers"):
        measure("base", Settings(problems=2, samples=2, max_new_tokens=2))


def test_the_flags_parse():
    assert parse_flags(Settings, "effect", ["base", "--problems", "8"]).problems == 8


# What was published.


@pytest.fixture(scope="module")
def published():
    return read(SAVED)


@pytest.fixture(scope="module")
def published_more():
    return read(SAVED_MORE)


@pytest.fixture(scope="module")
def printed(published, published_more):
    text = f"{tables(published)}\n{tables(published_more)}"
    return [line.rstrip() for line in text.splitlines()]


def test_the_saved_products_are_of_the_settings_that_the_pages_name(published, published_more):
    unlike = {"problems": 768, "block": 8, "brief": True}
    for records, changes in ((published, {}), (published_more, unlike)):
        assert list(records) == ["base", "grpo-alpha=0.0"]
        usual = vars(Settings()) | changes
        for record in records.values():
            places = ("models", "json", "figure")
            said = {name: value for name, value in record["settings"].items() if name not in places}
            assert said == {name: value for name, value in usual.items() if name not in places}
            assert len(record["right"]) == said["problems"]


PAGES = ["README.md", "lab/RESULTS.md", "docs/derivation.md"]
ROWS = ("alpha 0.4", "alpha 2", "full strength", "difficulty weight", "multiplicative 0.4")
LINES = ("noise floor", "plain gradients", "base, ", "grpo-alpha=0.0, ")


def quoted_rows(page):
    """Indented lines that look like rows of lab.effect's tables."""
    rows = []
    for line in Path(page).read_text().splitlines():
        if line.startswith("    ") and line.strip().startswith(ROWS + LINES):
            rows.append(line.removeprefix("    ").rstrip())
    return rows


@pytest.mark.parametrize("page", PAGES)
def test_rows_are_made_again_from_saved_sums(page, printed):
    for row in quoted_rows(page):
        assert row in printed, row


def test_there_are_rows_to_make_again():
    assert len(quoted_rows("docs/derivation.md")) >= 10


def degrees(measured, shaping, label="all"):
    row = measured.row(measured.shapings.index(shaping), label, "all")
    return math.degrees(math.acos(row["cosine"]["mean"]))


def test_the_page_says_how_far_updates_are_turned(published_more):
    text = " ".join(Path("docs/derivation.md").read_text().split())
    base, trained = [Measured(record) for record in published_more.values()]
    usual = round(degrees(base, "alpha 0.4"))
    halves = round(math.degrees(math.acos(base.halves()[0])))
    assert f"is turned by {usual} degrees and a tenth longer" in text
    assert f"two halves of the problems differ by {halves} degrees" in text
    by_weight = round(degrees(trained, "difficulty weight"))
    assert f"and turns it by {by_weight} degrees" in text
    alone = round(degrees(trained, "alpha 0.4, no baseline"))
    usual = round(degrees(trained, "alpha 0.4"))
    assert f"turns the update by {alone} degrees; with it by {usual}, most of them noise" in text


def test_the_page_says_what_groups_of_16_should_do(published_more):
    text = " ".join(Path("docs/derivation.md").read_text().split())
    base = Measured(published_more["base"])
    p = sum(base.record["right"]) / 768 / 16
    sums = base.sums["all"]
    entropy = torch.tensor(sums["weight H"].sum() / sums["weight"].sum())
    shaping = entropy_advantage(0.4, 2.0)
    of_groups, _ = multiplier_of_groups(shaping, p, entropy, 16)
    large = multiplier(shaping, torch.tensor(p), entropy)
    assert f"mean p of these problems, {p:.3f}, and the mean H of {float(entropy):.2f}" in text
    assert f"of groups of 16 is {of_groups:.3f}, that of large ones {large:.3f}" in text
    assert f"1.5 − p is {1.5 - p:.3f}" in text


def test_the_points_of_the_map_are_those_of_the_rows(published):
    measured = Measured(published["base"])
    points = cells(measured)
    assert points
    row = measured.row(1, "H of 1 and more", "under 1/4 right")
    assert any(point["projection"] == row["projection"]["mean"] for point in points)
