"""lab/gpu.py: runs whole on the pretended device; its floors against hand-made sums and torch's own
count of operations, its statistics against a table, and no part that fails costs the others."""

import gzip
import json
import math
import re
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from lab.gpu import Settings, check
from lab.gpu_checks import apart, chi_square, logits_of, nucleus
from lab.gpu_figures import (
    Ceilings,
    decode_floor,
    made_up_advantage,
    made_up_episodes,
    training_settings,
    update_operations,
)
from lab.gpu_report import FAILED, OK, SKIPPED, Report, Row, median_seconds, plain
from lab.gpu_shapes import SHAPES, TINY, peer_of, random_model
from lab.gpu_tables import all_tables, read_record
from model import count_parameters
from plumbing.optimizer import make_optimizer
from pretended import FEW_PROBLEMS, ROOT, pretended_python

CPU = torch.device("cpu")

WHOLE = """
import gc
import runpy
import lab.gpu_figures

gc.freeze()  # it is collected after every part
sys.argv = ["lab.gpu", "--shapes", "tiny", "--json", {file!r}]
runpy.run_module("lab.gpu", run_name="__main__")
"""


def test_the_whole_command_on_the_pretended_device(tmp_path):
    """Every part ends with figures, every check is good, and the graphs were used."""
    file = tmp_path / "gpu.json"
    printed = pretended_python(FEW_PROBLEMS + WHOLE.format(file=str(file)))
    record = json.loads(file.read_text())
    assert record["machine"]["card"] == "a pretended card"
    rows = record["rows"]
    assert [row["what"] for row in rows if row["verdict"] in (FAILED, SKIPPED)] == []
    assert [row["what"] for row in rows if row["value"] == "nan"] == []
    text = "; ".join(row["what"] for row in rows)
    for part in (
        "logits in float32",
        "graph against eager, bfloat16, top-p 0.9, call 2",
        "chi-square of the sampler's first tokens",
        "gap, both in bfloat16",
        "ppo update, gradient (critic)",
        "grpo step, bfloat16 weights",
        "stopped and resumed",
        "copy, bytes",
        "refill, 16 slots, bfloat16, graph",
        "static batches",
        "GRPO step, default flags, float32: rollout",
        "decode, 4 slots, eager, a step",
        "transformers' generate, 4 slots",
        "update of 4 answers",
        "memory of update, planned",
        "the same loss over transformers' model",
    ):
        assert part in text, part
    graphs = [row["note"] for row in rows if row["what"].startswith("samplers without")]
    assert len(graphs) == 2
    assert not any("given up" in note or note.endswith("captured: 0") for note in graphs)
    table = printed.partition("| times the floor | note |")[2].partition("\n\n")[0]
    assert table.count("\n| a pretended card |") == len(rows)
    assert "| a pretended card | tiny | 4 |" in printed  # of a decode step


@pytest.mark.parametrize(
    "name, weights",
    [("135M", 134_515_008), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)],
)
def test_shapes_have_as_many_weights_as_the_published_models(name, weights):
    """SmolLM2-135M, Qwen2.5-1.5B and Qwen2.5-7B, as the hub counts them."""
    assert count_parameters(SHAPES[name].config) == weights


def test_a_random_model_is_sane():
    """Its weights are drawn, and its words nearly equally likely: below log V by far less than it."""
    model = random_model(TINY, CPU, torch.float32)
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert values.isfinite().all()
    spread = model.layers[1].mlp.up_proj.weight.detach().std()
    assert float(spread) == pytest.approx(0.02, rel=0.1)
    logp = logits_of(model, torch.arange(20)[None]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    assert math.log(128) - 0.1 < entropy < math.log(128)


LLAMA = SHAPES["135M"].config | dict(vocab_size=64, num_hidden_layers=2)


@pytest.mark.parametrize("config", [TINY, TINY | dict(tie_word_embeddings=True), LLAMA])
def test_the_peer_computes_the_same(config):
    """transformers' model over the same memory, of all families and heads among the shapes."""
    model = random_model(config, CPU, torch.float32, std=0.05)
    peer = peer_of(model).eval()
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert apart(peer(tokens).logits, logits_of(model, tokens)) < 1e-5
    assert peer.model.embed_tokens.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    assert peer.lm_head.weight.data_ptr() == model.head.data_ptr()


def test_the_floor_of_a_decode_step():
    """By hand: in a layer of width 32, with 4 heads over 2 of 8 numbers and an inner width of 64,
    q 32*32+32, k and v 32*16+16 each, o 32*32, the MLP 3*32*64, norms 64: 9344. Two of them, the
    last norm 32, the head 128*32: 22816 weights of 2 bytes. 4 slots of 5 + 12 tokens, each of
    2 layers, keys and values, 2 heads of 8 numbers of 2 bytes: 68 * 128 bytes. For each slot each
    weight multiplies and adds. With as few operations a second, those are the floor."""
    ceilings = Ceilings()
    ceilings.bandwidth = 1e9
    ceilings.rate[torch.bfloat16] = 1e12
    assert decode_floor(SHAPES["tiny"], TINY, 4, ceilings) == (45632 + 8704) / 1e9
    ceilings.rate[torch.bfloat16] = 1e9
    assert decode_floor(SHAPES["tiny"], TINY, 4, ceilings) == 4 * 2 * 22816 / 1e9


def test_the_tables_of_the_page_are_those_of_the_saved_rows():
    """lab/BENCHMARKS.md has each table that is made of them, as it is made."""
    page = (ROOT / "lab/BENCHMARKS.md").read_text()
    tables = all_tables(read_record(ROOT / "lab/results/gpu-h200.json.gz")).split("\n\n")[1::2]
    assert len(tables) == 6
    for table in tables:
        assert table in page, table.splitlines()[0]


def test_tables_name_what_was_found():
    """By hand: two checks are one line, of the larger value; a step's floor by bytes is
    the tiny model's 54,336 over a gigabyte a second, that by products 182,528 operations over a
    hundredth of a tera-operation."""
    record = {
        "machine": {"card": "mine"},
        "rows": [
            plain(row)
            for row in (
                Row("a", "gap, one", 0.25, note="at most 1; more", verdict=OK),
                Row("b", "gap, two", 0.5, note="at most 1", verdict=OK),
                Row("", "copy, bytes read and written", 1.0, "GB/s"),
                Row("", "product, bfloat16", 0.01, "TFLOP/s"),
                Row("tiny", "weights", 1.0, "billion"),
                Row("tiny", "decode, 4 slots, graph, a step", 0.1, "ms"),
                Row("tiny", "decode, 4 slots, eager, a step", 0.2, "ms"),
                Row("tiny", "decode, 4 slots, graph", 30.0, "tokens/s"),
                Row("tiny", "transformers' generate, 4 slots", 20.0, "tokens/s"),
            )
        ],
    }
    tables = all_tables(record)
    assert "| mine | gap | 2 | 0.5 | at most 1 | 0 |" in tables
    line = "| mine | tiny | 4 | 0.1 | 0.2 | 2 | 0.0543 | 0.0183 | 1.84 | 30 | 20 | 1.5 |"
    assert line in tables
    assert "The update" not in tables


def test_the_floor_of_an_update():
    """Against the operations that torch counts in matrix products. The head's second forward pass,
    and what attention multiplies, are no part of the floor; norms and biases multiply nothing."""
    shape = SHAPES["tiny"]
    model = random_model(TINY, CPU, torch.float32)
    s = training_settings(shape, CPU)
    s.dtype = s.weights = "float32"
    optimizer = make_optimizer(model, s.lr, s)
    old_logp, advantage = made_up_advantage(shape, model)
    with FlopCounterMode(display=False) as counter:
        train.update(model, optimizer, made_up_episodes(shape, model), old_logp, advantage, s)
    products = {
        str(operation): count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if str(operation) in ("aten.mm", "aten.addmm")
    }
    prompt, response = shape.lengths
    second_pass = 2 * shape.answers * response * model.head.numel()
    counted = sum(products.values()) - second_pass
    assert counted == pytest.approx(update_operations(shape, TINY), rel=0.02)


def test_chi_square_as_a_normal_number():
    """A table's 99 % quantile of chi-square with 10 degrees of freedom is 23.209, and that of a
    normal number 2.326."""
    expected = torch.full((11,), 1000.0)
    counts = expected.clone()
    off = math.sqrt(23.209 * 1000 / 2)
    counts[0] += off
    counts[1] -= off
    assert chi_square(counts, expected) == pytest.approx(2.326, abs=0.02)


def test_chi_square_sees_a_wrong_distribution_and_an_impossible_word():
    random = torch.Generator().manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    drawn = torch.multinomial(p, 20000, replacement=True, generator=random)
    counts = drawn.bincount(minlength=5).double()
    assert chi_square(counts, p.double() * 20000) < 4
    wrong = torch.tensor([0.38, 0.32, 0.2, 0.1, 0.0])
    assert chi_square(counts, wrong.double() * 20000) > 4
    counts[4] = 1
    assert chi_square(counts, p.double() * 20000) == math.inf


def test_nucleus():
    p = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert nucleus(p, 0.7).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert nucleus(p, 1.0).tolist() == pytest.approx(p.tolist())


@pytest.fixture
def report(tmp_path):
    return Report({"card": "mine"}, seconds=100, file=str(tmp_path / "rows.json"))


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(report, tmp_path):
    def broken():
        report.figure("before", 1.0, "s")
        raise RuntimeError("CUDA error\nmore of it")

    report.run("7B", "broken", broken, needs=1)
    report.run("7B", "whole", partial(report.figure, "after", 3.0, "s", floor=2.0), needs=1)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["before", "broken", "after"]
    assert rows[1]["verdict"] == FAILED
    assert rows[1]["note"] == "RuntimeError: CUDA error"
    assert rows[2]["ratio"] == 1.5
    assert "| mine | 7B | after | 3 s | 2 | 1.5 |" in report.table()


def test_rows_are_on_the_disk_after_every_part(report, tmp_path):
    report.run("", "first", partial(report.figure, "a", 1.0, "s"), needs=0)
    with pytest.raises(KeyboardInterrupt):
        report.run("", "stopped", stopped_by_hand, needs=0)
    assert [row["what"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [
        "a"
    ]


def stopped_by_hand():
    raise KeyboardInterrupt


def test_the_budget_is_kept(report):
    """A part that needs more than is left does not start, and one that takes longer is stopped."""
    report.run("7B", "too long", stopped_by_hand, needs=101)
    assert report.rows[-1].verdict == SKIPPED
    assert SKIPPED in Path(report.file).read_text()
    report.seconds = 0.3
    report.started = started = time.perf_counter()
    report.run("7B", "endless", partial(time.sleep, 20), needs=0.1)
    assert time.perf_counter() - started < 5
    assert report.rows[-1].verdict == FAILED
    assert "OutOfTime" in report.rows[-1].note


def test_a_peer_is_set_beside_the_row_of_its_own_shape(report):
    for shape, speed in {"135M": 50.0, "7B": 30.0}.items():
        report.run(shape, "ours", partial(report.figure, "ours", speed, "tokens/s"), needs=0)
    assert report.ours_against("ours", 20.0) == "ours: 1.5 times as fast"
    assert report.ours_against("another", 20.0) == ""


@pytest.mark.parametrize(
    "value, limit, verdict",
    [(1.0, 2.0, OK), (2.0, 1.0, FAILED), (math.nan, 1.0, FAILED), (0, 0, OK), (1e-9, 0, FAILED)],
)
def test_checks_have_limits(report, value, limit, verdict):
    report.check("what", value, limit)
    assert report.rows[-1].verdict == verdict
    assert len(report.failures()) == (verdict == FAILED)
    json.dumps(plain(report.rows[-1]), allow_nan=False)


def test_the_median_is_of_the_timed_calls():
    """The first, which warms up, is the longest; the median of 1, 20 and 60 ms is 20."""
    seconds = iter([0.2, 0.001, 0.06, 0.02])
    taken = median_seconds(lambda: time.sleep(next(seconds)), CPU, repeats=3)
    assert 0.02 <= taken < 0.05


def test_what_makes_no_sense_is_refused(tmp_path):
    assert check(Settings(shapes="135M,7B")) == ["135M", "7B"]
    with pytest.raises(ValueError, match="one is '8B'"):
        check(Settings(shapes="135M,8B"))
    with pytest.raises(ValueError, match="folder that does not exist"):
        check(Settings(json=str(tmp_path / "no" / "rows.json")))
    with pytest.raises(ValueError, match="--seconds"):
        check(Settings(seconds=-1.0))


def test_what_the_pages_say_of_a_whole_run_is_what_it_printed():
    saved = (ROOT / "lab/results/gpu-h200-train.txt.gz").read_bytes()
    printed = gzip.decompress(saved).decode()
    minutes, seconds = re.search(r"real\s+(\d+)m([\d.]+)s", printed).groups()
    assert (minutes, round(float(seconds))) == ("0", 48)
    base, trained = (
        re.search(rf"^{name} +(\S+)", printed, re.M)[1] for name in ("base", "trained")
    )
    page = " ".join((ROOT / "lab/BENCHMARKS.md").read_text().split())
    assert "default flags took 48 seconds on this machine" in page
    assert f"from a Pass@1 of {base} to {trained} on validation" in page
    assert "48 seconds on an H200" in (ROOT / "README.md").read_text()
