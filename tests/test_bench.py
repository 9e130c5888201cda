"""lab/bench.py: both sides do the same work, its figures are what the clock said, and the published
tables are those of the saved turns."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import lab.bench as bench
import lab.bench_work as bench_work
from lab.bench import Settings
from lab.bench_transformers import peer_generate, peer_model, peer_update
from lab.bench_turns import alternate, growth_table, quartiles, table
from lab.bench_work import encoded_prompts, our_update, rewards
from model import load
from plumbing.batch import micro_batches
from plumbing.memory import peak_memory
from plumbing.optimizer import make_optimizer
from plumbing.seeds import seeded_generator
from plumbing.settings import Settings as TrainSettings
from rollout import Sampler
from tasks import Problem

TINY = dict(turns=1, slots=16, new_tokens=4, prompts=4)


def test_the_first_groups_have_equal_answers():
    all_wrong = rewards(8, 0.25).view(8, 16).eq(-1).all(1)
    assert all_wrong.tolist() == [True, True] + [False] * 6


def by_tokens(part):
    return micro_batches(part, 500)


def all_at_once(part):
    return [list(range(len(part)))]


def test_both_updates_make_the_same_weights():
    """With SGD: AdamW would blow up the rounding of gradients near 0."""
    model, _ = load("base")
    settings = TrainSettings(grad_clip=0.5)
    start = model.head.detach().clone()
    reward = rewards(8, 0.25)
    sampler = Sampler(model, 128, 200, model.eos_ids)
    random = seeded_generator(0, 0, "test")
    episodes = sampler.generate(encoded_prompts(8), 16, 48, 1.0, random)

    make_optimizer(model, 0.0, settings)  # makes the gradients that update expects
    ours = torch.optim.SGD(model.parameters(), 0.1)
    tokens = our_update(model, ours, episodes, reward, settings)
    assert tokens == sum(len(episode.response) for episode in episodes)

    for cut in (by_tokens, all_at_once):
        peer = peer_model(load("base")[0])
        theirs = torch.optim.SGD(peer.parameters(), 0.1)
        assert peer_update(peer, theirs, episodes, reward, settings, cut) == tokens
        apart = (peer.model.embed_tokens.weight - model.head).abs().max()
        moved = (start - model.head).abs().max()
        assert apart < 1e-5 < 1e-3 < moved


class FakePeer:
    """Its `generate` ends after 2, never, and after 1 token."""

    device = "cpu"
    generation_config = type("", (), {})()

    def generate(self, ids, **options):
        assert options["do_sample"]
        assert (options["top_k"], options["top_p"], options["temperature"]) == (0, 1.0, 1.0)
        responses = torch.tensor([[5, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]])
        return torch.cat((ids, responses), 1)


def test_what_generate_made_is_counted_up_to_the_first_end_token():
    assert peer_generate(FakePeer(), [[1, 2]] * 3, 4, 0) == 2 + 4 + 1
    assert peer_generate(FakePeer(), [[1, 2]] * 3, 4, None) == 12


def test_turns_alternate_and_the_first_does_not_count():
    order = []

    def side(name):
        def work():
            order.append(name)
            return len(order)

        return work

    taken = alternate({"ours": side("a"), "peer": side("b")}, 3)
    assert order == list("ba" + "ab" + "ba" + "ab")
    assert [tokens for _, tokens in taken["ours"]] == [3, 6, 7]
    assert [tokens for _, tokens in taken["peer"]] == [4, 5, 8]

    order.clear()
    taken = alternate({"ours": side("a"), "peer": side("b")}, 1, warm_up=2)
    assert order == list("ba" + "ab" + "ba")
    assert taken["ours"][0][1] == 6 and len(taken["ours"]) == 1


def test_ratios_are_taken_within_a_turn():
    taken = {
        "ours": [(1.0, 10), (2.0, 20), (4.0, 80)],
        "peer": [(3.0, 10), (4.0, 20), (20.0, 100)],
    }
    assert quartiles([1, 2, 3, 4, 5]) == "3 [2, 4]"
    assert table(taken).splitlines()[2:] == [
        "| ours | 2 [1.5, 3] | 10 | 3 [2.5, 4] |",
        "| peer | 4 [3.5, 12] | 5 |  |",
    ]


def test_the_commands_run_and_leave_their_figures(tmp_path, capsys):
    file = tmp_path / "b.json"
    commands = ("decode", "refill", "update")
    bench.bench(Settings(commands=commands, json=str(file), device="cpu", **TINY))
    printed = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert "torch " + torch.__version__ in printed
    assert printed.count("| ours") == 5
    assert [tokens for _, tokens in record["decode"]["ours, bf16"]] == [64]
    assert [len(turns) for turns in record["refill"].values()] == [1] * 4
    tokens_of_sides = {turns[0][1] for turns in record["update"].values()}
    assert len(tokens_of_sides) == 1  # equal tokens


def test_another_model_is_benched_beside_itself_in_transformers(qwen2, capsys):
    """A Llama, in one precision: the peer's logits are those of the model that wrote the folder."""
    folder, theirs = qwen2(family=LlamaConfig, num_hidden_layers=3)
    peer = peer_model(load(str(folder))[0])
    ids = torch.tensor([[5, 9, 2, 7]])
    assert (peer(ids).logits - theirs(ids).logits).abs().max() < 1e-5
    assert type(peer) is type(theirs)

    shape = TINY | dict(model=str(folder), dtype="fp32", device="cpu")
    record = bench.bench(Settings(commands=("decode", "refill", "update"), **shape))
    assert list(record["decode"]) == [
        "ours, fp32",
        "generate, fp32",
        "generate, fp32, static cache",
    ]
    assert {turns[0][1] for turns in record["decode"].values()} == {16 * 4}
    assert list(record["refill"]) == ["ours, fp32", "generate, fp32, static batches"]
    assert all(turns[0][1] <= 64 * 4 for turns in record["refill"].values())
    ((_, tokens),) = record["update"]["ours"]
    assert 64 <= tokens <= 64 * 4
    assert "bf16" not in capsys.readouterr().out


def test_prompts_are_of_one_length_in_any_tokenizer(monkeypatch):
    """The first that are as long as the first of all, by a tokenizer of characters."""
    problems = [Problem(text, "") for text in ("ab", "abc", "cd", "abcd", "ef", "gh")]
    pretended = {
        "load_task": lambda name: SimpleNamespace(train=problems, encode=characters),
        "open_pretrained": lambda model: SimpleNamespace(tokenizer=list),
    }
    for name, instead in pretended.items():
        monkeypatch.setattr(bench_work, name, instead)
    found = encoded_prompts(3, "any")
    assert ["".join(prompt) for prompt in found] == ["ab", "cd", "ef"]


def characters(problem, tokenizer):
    return tokenizer(problem.prompt)


@pytest.mark.parametrize(
    "bad,sentence",
    [
        (
            dict(model="smollm2", commands=("decode", "step")),
            "--model goes with decode, refill, update; not with step",
        ),
        (dict(warm_up=0), "--warm-up must be at least 1"),
        (dict(slots=10), "--slots must be a multiple of 16; it is 10"),
        (dict(prompts=5), "--prompts must be a multiple of 4; it is 5"),
        (dict(equal=1.5), "--equal must be a share from 0 to 1; it is 1.5"),
        (dict(equal=-0.1), "--equal must be at least 0"),
        (dict(turns=0), "--turns must be at least 1"),
    ],
)
def test_a_bad_setting_is_one_sentence(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench.bench(Settings(**dict(commands=("decode",)) | TINY | bad))


def test_growth_varies_number_length_and_equal_groups(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPE", (32, 4))
    record = bench.bench(Settings(commands=("growth",), device="cpu", **TINY))
    decode = record["growth"]["decode"]
    tokens = {name: turns[0][1] for name, turns in decode.items()}
    assert tokens["32 sequences of 4 tokens"] == 128
    assert tokens["64 sequences of 4 tokens"] == 256
    update = record["growth"]["update"]
    assert update["32 sequences of 4 tokens, 50% of the groups equal"][0][1] == 128
    assert "microseconds per token" in capsys.readouterr().out


def test_a_step_beside_trl(capsys):
    """Both answer the task's problems."""
    pytest.importorskip("trl")
    record = bench.bench(Settings(commands=("step",), device="cpu", equal=0.25, **TINY))
    for name in ("step, 25% equal", "step, 0% equal"):
        for side in ("ours", "TRL"):
            ((_, tokens),) = record[name][side]  # one turn
            assert 64 * 20 < tokens < 64 * 90


def test_memory_is_that_of_a_process_of_its_own(monkeypatch):
    """Not the parent's peak, which getrusage would tell."""
    ballast = torch.ones(400_000_000)  # 1.6 GB
    monkeypatch.setattr(bench, "SIDES", ("ours",))
    found = bench.memory(Settings(commands=("memory",), device="cpu", **TINY))
    ((before, peak),) = found.values()
    assert 0.1 < before < peak < 1.2 < peak_memory(torch.device("cpu")) and len(ballast)


def test_the_published_tables_come_from_the_saved_turns():
    published = Path("lab/BENCHMARKS.md").read_text()
    record = json.loads(Path("lab/results/bench.json").read_text())
    tables = [growth_table(taken) for taken in record["growth"].values()]
    for name, taken in record.items():
        of_two_sides = isinstance(taken, dict) and name not in ("memory", "growth")
        if of_two_sides:
            tables.append(table(taken))
    assert len(tables) == 7
    for file in ("bench-smollm2", "bench-smollm2-two-threads"):
        of_smollm2 = json.loads(Path(f"lab/results/{file}.json").read_text())
        tables += [table(of_smollm2[name]) for name in ("decode", "update")]
    for line in "\n".join(tables).splitlines():
        assert line in published, line
    for side, (before, peak) in record["memory"].items():
        assert f"| {side} | {peak:.2f} | {before:.2f} |" in published
