"""lab/effect_methods.py: its gradients against those that train.update leaves to an optimizer, its
figures against gradients made by hand, and what lab/METHODS.md and lab/results/METHODS.md show
against the saved products."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from advantage import group_advantage
from conftest import dice, distance
from lab.effect_methods import (
    BANDS,
    Settings,
    add_gradients,
    compared,
    effect,
    flat,
    low_rank,
    measure,
    move,
    rollout_of,
    update_of,
)
from lab.effect_methods_report import Place, summary, tables
from lab.gradients import pack, products
from lab.methods import METHODS, find
from lab.saved import read_packed
from model import load, score
from plumbing.method import advantage_of
from plumbing.settings import parse_flags
from test_methods import make_episodes, many_clipped, many_held
from train import update

ROWS = compared(Settings(samples=4))
# Of three groups; nothing is right in the second.
REWARDS = torch.tensor([1.0, -1, -1, -1, -1, -1, -1, -1, 1, -1, -1, 1])


class Keeps(torch.optim.Optimizer):
    """Does not step, and keeps the gradient that it was given."""

    def __init__(self, model):
        super().__init__(model.parameters(), {})
        self.named = list(model.named_parameters())
        for _, parameter in self.named:
            parameter.grad = torch.zeros_like(parameter)

    def step(self):
        self.found = flat(self.named, [parameter.grad for _, parameter in self.named])


@pytest.fixture(scope="module", autouse=True)
def more_tokens():
    """Clip-Cov and KL-Cov with more tokens than are theirs, which would be one."""
    with pytest.MonkeyPatch.context() as patch:
        find.cache_clear()
        patch.setitem(METHODS, "clip-cov", METHODS["clip-cov"]._replace(weigh=many_clipped))
        patch.setitem(METHODS, "kl-cov", METHODS["kl-cov"]._replace(loss_of=many_held))
        yield
    find.cache_clear()


@pytest.fixture(scope="module")
def model():
    found, _ = load("base")
    return found


@pytest.fixture(scope="module")
def rollout():
    """Twelve answers, three groups; ratios are on both sides of the clip."""
    return rollout_of(make_episodes(), REWARDS)


@pytest.fixture(scope="module")
def measured(model, rollout):
    """Of every row, the gradient of each group: [bands, methods, groups, numbers]; tokens cut."""
    updates = {name: update_of(rollout, s) for name, s in ROWS.items()}
    numbers = sum(parameter.numel() for parameter in model.parameters())
    vectors = torch.zeros(len(BANDS), len(ROWS), 3, numbers)
    cut = torch.zeros(len(ROWS))
    for i in range(3):
        answers = range(4 * i, 4 * i + 4)
        cut += add_gradients(vectors[:, :, i], model, rollout, answers, updates)
    return vectors, cut


def left_to_the_optimizer(model, rollout, s, advantage=None):
    """By train.update, all answers together."""
    if advantage is None:
        of_answers = advantage_of(s.method, group_advantage)(rollout.reward, rollout.group)
        advantage = of_answers[:, None] * rollout.mask
    optimizer = Keeps(model)
    s.grad_clip = 1e9
    update(model, optimizer, rollout.episodes, rollout.old_logp, advantage, s)
    return optimizer.found


def test_every_method_has_a_row_and_settings_of_its_own():
    assert list(ROWS)[0] == "grpo"
    assert set(ROWS) == {*METHODS, "entropy advantage", "full strength"}
    assert (ROWS["full strength"].method, ROWS["full strength"].alpha) == ("", 10.0)
    assert (ROWS["gspo"].clip_low, ROWS["gspo"].clip_high) == (3e-4, 4e-4)
    assert ROWS["adaptive-entropy"].entropy_coef == 0.005
    assert sum(s.entropy_coef > 0 for s in ROWS.values()) == 1


@pytest.mark.parametrize("name", ROWS)
def test_the_groups_gradients_add_up_to_the_one_of_an_update(name, model, rollout, measured):
    vectors, _ = measured
    want = left_to_the_optimizer(model, rollout, ROWS[name])
    found = vectors[:, list(ROWS).index(name)].sum(dim=(0, 1))
    assert distance(found, want) < 2e-5 * want.abs().max()


def test_the_rows_above_are_not_one_and_the_same(measured):
    """But for these: of equal groups, and of one advantage an answer."""
    vectors, _ = measured
    total = torch.nn.functional.normalize(vectors.sum(dim=(0, 2)).double())
    cosine = total @ total.T
    same = torch.triu(cosine > 1 - 1e-6, diagonal=1).nonzero().tolist()
    names = list(ROWS)
    pairs = {(names[i], names[j]) for i, j in same}
    assert pairs == {("gspo", "gspo-token"), ("dr-grpo", "rloo")}


@pytest.mark.parametrize("name", ["grpo", "full strength"])
def test_a_band_is_an_update_without_the_other_tokens(name, model, rollout, measured):
    """The fifth of highest entropy by sorting. Full strength leaves A = 0 as it is."""
    vectors, _ = measured
    found = rollout.entropy[rollout.mask].sort(descending=True).values
    least = found[int(0.2 * (len(found) - 1))]
    top = rollout.mask & (rollout.entropy >= least)
    of_answers = group_advantage(rollout.reward, rollout.group)[:, None]
    for band, inside in enumerate((top, rollout.mask & ~top)):
        want = left_to_the_optimizer(model, rollout, ROWS[name], of_answers * inside)
        ours = vectors[band, list(ROWS).index(name)].sum(dim=0)
        assert distance(ours, want) < 2e-5 * want.abs().max()


def test_few_rows_stand_for_all():
    """Two rows, sums of them in any size, and a row of zeros."""
    two = torch.randn(2, 50, generator=dice(0))
    shares = torch.tensor([[1.0, 0], [0, 1e-7], [3, 4], [-1e5, 2e5], [0, 0]])
    rows = shares @ two
    mixed, basis = low_rank(rows)
    assert (mixed.shape, basis.shape) == ((5, 2), (2, 50))
    assert torch.allclose(mixed @ basis, rows, rtol=1e-5, atol=0)
    independent = torch.eye(4)
    assert len(low_rank(independent)[1]) == 4
    assert len(low_rank(torch.zeros(4, 3))[1]) == 0


def test_what_is_cut_is_counted(rollout, measured):
    """grpo's by the rule of the clip; in 80-20 all but a fifth of the tokens of all groups."""
    _, cut = measured
    cut = dict(zip(ROWS, cut.tolist()))
    model, _ = load("base")
    advantage = update_of(rollout, ROWS["grpo"]).advantage
    clipped = 0
    for i, episode in enumerate(rollout.episodes):
        tokens = torch.cat((episode.prompt, episode.response))[None]
        length = len(episode.response)
        with torch.no_grad():
            logp, _ = score(
                model, tokens, torch.tensor([6]), torch.tensor([len(tokens[0])]), temperature=1.0
            )
        ratio = (logp[0, -length:] - episode.logp).exp()
        too_low = (advantage[i, 0] < 0) & (ratio < 0.8)
        too_high = (advantage[i, 0] > 0) & (ratio > 1.28)
        clipped += int((too_low | too_high).sum())
    assert cut["grpo"] == clipped > 20
    assert cut["kl-cov"] == cut["cispo"] == 0
    least = rollout.entropy[rollout.mask].quantile(0.8)
    taught = advantage != 0
    assert cut["80-20"] >= (taught & (rollout.entropy < least)).sum() > 100


def test_the_policy_moves_by_a_step_of_adamw_a_minibatch():
    """AdamW's steps are about as large as its learning rate: in the first exactly so (and weight decay
    is a hundredth of it, of weights that are about 1 at most)."""
    rollout = rollout_of(make_episodes()[:8], REWARDS[:8])
    s = dataclasses.replace(ROWS["grpo"], lr=1e-3, samples=4, minibatch=1)
    moved = []
    for answers in (4, 8):
        model, _ = load("base")
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        some = rollout_of(rollout.episodes[:answers], REWARDS[:answers])
        move(model, some, s)
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        moved.append(float((after - before).abs().median()))
    assert moved[0] == pytest.approx(1e-3, rel=0.03)
    # The second has no gradient, as nothing is right in its group, but moments go on.
    assert 1.4e-3 < moved[1] < 2e-3


# Figures.


def record_of(vectors, right):
    """A record of gradients made by hand, [bands, methods, blocks, numbers], at both places."""
    kept = dict(zip(("all tokens", *BANDS), (vectors.sum(dim=0), *vectors)))
    packed = {}
    for label, of_label in kept.items():
        both = products(of_label)
        packed[label] = {kind: pack(matrices) for kind, matrices in both.items()}
    names = [f"method {i}" for i in range(vectors.shape[1])]
    place = {"cut": [0.125] * len(names), "products": packed}
    return {
        "settings": {"task": "by hand", "samples": 8, "block": 1},
        "methods": names,
        "right": right,
        "blocks": [[i] for i in range(len(right))],
        "tokens": 100,
        "places": {"first": place, "last": place},
    }


RIGHT = [1, 0, 2, 4, 1, 5]
VECTORS = torch.randn(2, 3, 6, 4, generator=dice(0))


@pytest.mark.parametrize(
    ("column", "tokens", "problems"),
    [
        ("all tokens", [0, 1], [0, 1, 2, 3, 4, 5]),
        (BANDS[0], [0], [0, 1, 2, 3, 4, 5]),
        (BANDS[1], [1], [0, 1, 2, 3, 4, 5]),
        ("hard problems", [0, 1], [0, 1, 4]),
        ("other problems", [0, 1], [2, 3, 5]),
    ],
)
def test_figures_are_those_of_the_gradients(column, tokens, problems):
    place = Place(record_of(VECTORS, RIGHT), record_of(VECTORS, RIGHT)["places"]["last"])
    sums = VECTORS[tokens][:, :, problems].sum(dim=(0, 2)).numpy()
    for method in range(3):
        cosine, length, _ = place.figures(method, column)
        lengths = np.linalg.norm(sums, axis=1)
        want = sums[0] @ sums[method] / lengths[0] / lengths[method]
        assert cosine["mean"] == pytest.approx(want, rel=2e-3, abs=2e-4)
        assert length["mean"] == pytest.approx(lengths[method] / lengths[0], rel=2e-3)
    itself, *_ = place.figures(0, column)
    assert itself["interval"] == pytest.approx([1, 1], abs=1e-6)


def test_noise_of_its_own_does_not_turn_the_expected_gradient():
    """A signal that all problems share, and noise that each has for itself, in the second method in
    other directions: with noise the cosine is 2/3, without 1. And without the signal there is none."""
    noise = torch.linalg.qr(torch.randn(41, 41, generator=dice(1))).Q
    for signal in (1.0, 0.0):
        vectors = torch.zeros(2, 2, 20, 41)
        vectors[0] = signal * noise[40] * 0.1**0.5
        vectors[0, 0] += noise[:20]
        vectors[0, 1] += noise[20:40]
        record = record_of(vectors, [1] * 20)
        cosine, _, expected = Place(record, record["places"]["first"]).figures(1, "all tokens")
        if signal:
            # Squares 20^2 / 10 = 40 of the signal and 20 of the noise.
            assert cosine["mean"] == pytest.approx(40 / 60, rel=1e-2)
            assert expected["mean"] == pytest.approx(1, rel=1e-2)
        else:
            assert np.isnan(expected["mean"])


def test_the_floor_is_the_cosine_of_other_problems():
    """Hard problems along (1, 0), the others along (0, 1): halves of the hard ones agree."""
    vectors = torch.zeros(2, 1, 6, 2)
    for i, right in enumerate(RIGHT):
        vectors[0, 0, i, int(right >= 2)] = 1.0
    record = record_of(vectors, RIGHT)
    place = Place(record, record["places"]["first"])
    assert place.noise_floor("hard problems")["mean"] == pytest.approx(1)
    assert 0 < place.noise_floor("all tokens")["mean"] < 0.95


def test_the_tables_have_a_row_a_method_and_no_figure_where_there_is_no_gradient():
    vectors = VECTORS.clone()
    vectors[1, 2] = 0.0
    head, cosines, lengths, *_ = tables({"hand": record_of(vectors, RIGHT)}).split("\n\n")
    assert head.startswith("**hand**: by hand, 6 problems × 8 answers, 0.271 right, 100 tokens. 5 ")
    *_, last = cosines.splitlines()
    cells = [cell.strip() for cell in last.split("|")]
    assert cells[1] == "method 2"
    assert cells[4] != "" and cells[5] == ""
    assert cells[-2] == "12.50%"
    assert len(lengths.splitlines()) == 4


def test_the_summary_has_a_row_a_method_and_a_column_a_model_and_place():
    """Each cosine that of the summed gradients, taken here without products."""
    record = record_of(VECTORS, RIGHT)
    record["places"]["last"] = record_of(VECTORS.flip(1), RIGHT)["places"]["first"]
    other = record_of(VECTORS.roll(1, dims=1), RIGHT)
    head, _, halves, *rows = summary({"one": record, "two": other}).splitlines()
    titles = [cell.strip() for cell in head.split("|")[2:-1]]
    assert titles == ["one, first", "one, last", "two, first", "two, last"]
    assert halves.count("[") == 4

    first = VECTORS.sum(dim=(0, 2))
    gradients = [first, first.flip(0), first.roll(1, dims=0), first.roll(1, dims=0)]
    assert len(rows) == 2
    for method, row in enumerate(rows, start=1):
        label, *cells = row.split("|")[1:-1]
        assert label.strip() == f"method {method}"
        want = [float(torch.cosine_similarity(g[0], g[method], dim=0)) for g in gradients]
        means = [float(cell.split()[0]) for cell in cells]
        assert means == pytest.approx(want, abs=2e-3)


def test_the_command_saves_what_it_prints(tmp_path, capsys):
    file = tmp_path / "effect.json.gz"
    sizes = dict(task="countdown-easy", problems=6, samples=8, max_new_tokens=64, block=1, moves=2)
    effect(Settings(models=("base",), json=str(file), **sizes))
    printed = capsys.readouterr().out
    effect(Settings(again=str(file)))
    assert capsys.readouterr().out == printed
    [record] = read_packed(file).values()
    first, last = [Place(record, place) for place in record["places"].values()]
    cispo = first.methods.index("cispo")
    assert first.figures(cispo, "all tokens")[0]["mean"] == pytest.approx(1, abs=1e-6)
    assert first.cut[cispo] == first.cut[0] == 0
    gspo = first.methods.index("gspo")
    assert first.cut[gspo] == 0 < last.cut[gspo]


def test_a_policy_that_is_not_moved_has_one_place():
    sizes = dict(task="countdown-easy", problems=6, samples=8, max_new_tokens=64, block=1, moves=0)
    records = {"base": measure("base", Settings(**sizes))}
    assert list(records["base"]["places"]) == ["first"]
    assert summary(records).startswith("| cosine with plain GRPO's update | base, first |\n")
    assert "base, the first update" in tables(records) and "the last" not in tables(records)


def test_the_command_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="either models to measure or --again"):
        effect(Settings())
    with pytest.raises(FileNotFoundError, match="a folder that does not exist"):
        effect(Settings(models=("base",), json=str(tmp_path / "no" / "file.json.gz")))
    with pytest.raises(ValueError, match="only 0 of 4 problems had right and wrong answers"):
        effect(Settings(models=("base",), problems=4, samples=2, max_new_tokens=2))


# What was published.

PAGE = Path("lab/METHODS.md").read_text()
TABLES = Path("lab/results/METHODS.md").read_text()
SECTION = "\n## Which of them turn the update at all?\n"


@pytest.fixture(scope="module")
def saved():
    return read_packed("lab/results/effect-methods.json.gz")


def test_the_tables_of_both_pages_are_made_again_from_the_saved_products(saved):
    """And each figure with an interval in the section's text is one of theirs."""
    shown = summary(saved)
    long_tables = tables(saved)
    assert shown in PAGE
    assert long_tables in TABLES
    _, rest = PAGE.split(SECTION)
    section, *_ = rest.split("\n## ")
    text = section.replace(shown, "")
    figures = re.findall(r"\d\.\d{3}\s\[[^]]*\]", text)
    assert len(figures) == 9
    found_nowhere = [
        figure for figure in figures if " ".join(figure.split()) not in shown + long_tables
    ]
    assert found_nowhere == []


def test_the_saved_products_are_of_the_settings_that_the_page_names(saved):
    assert list(saved) == ["base", "grpo-alpha=0.0"]
    places = dict(models=(), json="", again="", device="")
    for record in saved.values():
        assert record["settings"] | places == vars(Settings()) | places
        assert record["methods"] == list(ROWS)


def cosines(record, place):
    """Method -> its cosine over all tokens."""
    found = Place(record, record["places"][place])
    return {
        method: found.figures(i, "all tokens")[0]["mean"] for i, method in enumerate(found.methods)
    }


@pytest.mark.parametrize("place", ["first", "last"])
def test_what_the_text_says_of_the_base(saved, place):
    found = cosines(saved["base"], place)
    gspo = {found.pop("gspo"), found.pop("gspo-token")}
    assert max(gspo) < 0.95
    assert found.pop("80-20") < 0.5
    assert round(math.degrees(math.acos(found.pop("gtpo-apart")))) == 76
    assert min(found.values()) > 0.9885
    assert min(found[name] for name in ("cispo", "kl-cov", "clip-cov")) > 0.9995
    if place == "first":
        assert round(math.degrees(math.acos(cosines(saved["base"], place)["80-20"]))) == 63
    else:
        assert round(math.degrees(math.acos(max(gspo)))) == 52


SMOLLM2 = read_packed("lab/results/smollm2-effect-methods.json.gz")


def test_smollm2s_tables_and_figures_are_made_again(saved):
    """One of the figures in the text is the base's."""
    shown = summary(SMOLLM2)
    long_tables = tables(SMOLLM2)
    assert shown in PAGE
    assert long_tables in TABLES
    _, section = PAGE.split("\n## And of a real model?\n")
    text = section.replace(shown, "")
    figures = [" ".join(found.split()) for found in re.findall(r"\d\.\d{3}\s\[[^]]*\]", text)]
    assert len(figures) == 5
    found_nowhere = [figure for figure in figures if figure not in shown + long_tables]
    assert found_nowhere == ["0.450 [0.276, 0.730]"]
    assert found_nowhere[0] in summary(saved)


def test_smollm2s_settings_are_those_of_the_pages_command():
    [record] = SMOLLM2.values()
    [command] = re.findall(r"python -m lab.effect_methods (smollm2 .*)", PAGE)
    wanted = vars(parse_flags(Settings, "effect", command.split()))
    assert record["settings"] | dict(json="") == wanted | dict(json="", models=["smollm2"])
    assert record["methods"] == list(ROWS)
    assert round(record["seconds"] / 60) == 33


def test_what_the_text_says_of_smollm2():
    found = cosines(SMOLLM2["smollm2"], "first")
    assert found.pop("gtpo-apart") < 0.2
    assert found.pop("maxrl") < found.pop("80-20") < 0.93
    assert min(found.values()) > 0.9665
