"""lab/bench.py: both sides do the same work, and its figures are what the clock said."""

import json
from pathlib import Path

import pytest
import torch

import lab.bench as bench
import train
from lab.bench import Settings, alternate, encoded, peer_generate, peer_model, peer_update, our_update, quartiles, rewards, table
from model import load
from rollout import Sampler, micro_batches, seeded_generator

TINY = dict(turns=1, slots=16, new_tokens=4, prompts=4)


def test_both_updates_make_the_same_weights():
    """With SGD: AdamW would blow up the rounding of gradients near 0."""
    model, _ = load("base")
    s, start, reward = train.Settings(grad_clip=0.5), model.head.detach().clone(), rewards(8, 0.25)
    assert reward.view(8, 16).eq(-1).all(1).tolist() == [True, True] + [False] * 6
    episodes = Sampler(model, 128, 200, model.eos_ids).generate(encoded(8), 16, 48, 1.0, seeded_generator(0, 0, "test"))
    train.adamw(model, 0.0, s)                                                      # makes the gradients that update expects
    tokens = our_update(model, torch.optim.SGD(model.parameters(), 0.1), episodes, reward, s)
    assert tokens == sum(len(e.response) for e in episodes)
    for cut in (lambda part: micro_batches(part, 500), lambda part: [list(range(len(part)))]):
        peer = peer_model(load("base")[0])
        assert peer_update(peer, torch.optim.SGD(peer.parameters(), 0.1), episodes, reward, s, cut) == tokens
        assert (peer.model.embed_tokens.weight - model.head).abs().max() < 1e-5 < 1e-3 < (start - model.head).abs().max()


def test_what_generate_made_is_counted_up_to_the_first_end_token():
    class Fake:
        device, generation_config = "cpu", type("", (), {})()

        def generate(self, ids, **options):
            assert options["do_sample"] and (options["top_k"], options["top_p"], options["temperature"]) == (0, 1.0, 1.0)
            return torch.cat((ids, torch.tensor([[5, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]])), 1)
    assert peer_generate(Fake(), [[1, 2]] * 3, 4, 0) == 2 + 4 + 1
    assert peer_generate(Fake(), [[1, 2]] * 3, 4, None) == 12


def test_turns_alternate_and_the_first_does_not_count():
    order = []
    side = lambda name: lambda: order.append(name) or len(order)
    taken = alternate({"ours": side("a"), "peer": side("b")}, 3)
    assert order == list("ba" + "ab" + "ba" + "ab")
    assert [tokens for _, tokens in taken["ours"]] == [3, 6, 7] and [tokens for _, tokens in taken["peer"]] == [4, 5, 8]


def test_ratios_are_taken_within_a_turn():
    taken = {"ours": [(1.0, 10), (2.0, 20), (4.0, 80)], "peer": [(3.0, 10), (4.0, 20), (20.0, 100)]}
    assert quartiles([1, 2, 3, 4, 5]) == "3 [2, 4]"
    assert table(taken).splitlines()[2:] == ["| ours | 2 [1.5, 3] | 10 | 3 [2.5, 4] |", "| peer | 4 [3.5, 12] | 5 |  |"]


def test_the_commands_run_and_leave_their_figures(tmp_path, capsys, monkeypatch):
    bench.bench(Settings(commands=("decode", "refill", "update"), json=str(tmp_path / "b.json"), device="cpu", **TINY))
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "torch " + torch.__version__ in printed and printed.count("| ours") == 5
    assert [tokens for _, tokens in record["decode"]["ours, bf16"]] == [64]
    assert [len(turns) for turns in record["refill"].values()] == [1] * 4
    assert len({turns[0][1] for turns in record["update"].values()}) == 1           # equal tokens
    share = "--slots must be a multiple of 16, --prompts of 4, --equal a share"
    for bad, sentence in ((dict(slots=10), share), (dict(prompts=5), share), (dict(equal=1.5), share),
                          (dict(equal=-0.1), "--equal must be at least 0"), (dict(turns=0), "--turns must be at least 1")):
        with pytest.raises(ValueError, match=sentence):
            bench.bench(Settings(commands=("decode",), **TINY | bad))


def test_growth(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPE", (32, 4))
    record = bench.bench(Settings(commands=("growth",), device="cpu", **TINY))
    tokens = {name: turns[0][1] for name, turns in record["growth"]["decode"].items()}
    assert tokens["32 sequences of 4 tokens"] == 128 and tokens["64 sequences of 4 tokens"] == 256
    assert record["growth"]["update"]["32 sequences of 4 tokens, 50% of the groups equal"][0][1] == 128
    assert "microseconds per token" in capsys.readouterr().out


def test_a_step_beside_trl(capsys):
    pytest.importorskip("trl")
    record = bench.bench(Settings(commands=("step",), device="cpu", equal=0.25, **TINY))
    for name in ("step, 25% equal", "step, 0% equal"):
        assert len(record[name]["ours"]) == len(record[name]["TRL"]) == 1
        (_, ours), (_, theirs) = record[name]["ours"][0], record[name]["TRL"][0]
        assert 64 * 20 < ours < 64 * 90 and 64 * 20 < theirs < 64 * 90          # both answer the task's problems


def test_memory_of_a_process_of_its_own(monkeypatch):
    """Not the parent's peak, which getrusage would tell."""
    ballast = torch.ones(400_000_000)                                               # 1.6 GB
    monkeypatch.setattr(bench, "SIDES", ("ours",))
    [(before, peak)] = bench.memory(Settings(commands=("memory",), device="cpu", **TINY)).values()
    assert 0.1 < before < peak < 1.2 < train.peak_memory(torch.device("cpu")) and len(ballast)


def test_the_published_tables_come_from_the_saved_turns():
    published = Path("lab/BENCHMARKS.md").read_text()
    record = json.loads(Path("lab/results/bench.json").read_text())
    found = [table(taken, growth=True) for taken in record["growth"].values()]
    found += [table(taken) for name, taken in record.items() if isinstance(taken, dict) and name not in ("memory", "growth")]
    assert len(found) == 7
    for line in "\n".join(found).splitlines():
        assert line in published, line
    for side, (before, peak) in record["memory"].items():
        assert f"| {side} | {peak:.2f} | {before:.2f} |" in published
