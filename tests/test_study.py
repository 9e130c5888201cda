"""lab/study.py: its tables and intervals from hand-made counts."""

import gzip
import json

import pytest

from lab.study import ARMS, BEHAVIOUR, key, read, tables


def save(folder, arm, seed, solved):
    record = {"solved": solved, "samples": 256, **{name: 1.0 for name in BEHAVIOUR}}
    (folder / f"{key(arm, seed)}.json.gz").write_bytes(gzip.compress(json.dumps(record).encode()))


def test_tables_by_hand(tmp_path):
    plain, shaped = ARMS
    save(tmp_path, "base", 0, [0, 64])
    for seed, (a, b) in enumerate([(64, 64), (64, 128), (64, 192)]):       # Pass@1 of every problem: a / 256, b / 256
        save(tmp_path, plain, seed, [a, a])
        save(tmp_path, shaped, seed, [b, b])
    lines = tables(tmp_path).splitlines()
    assert lines[2].startswith("| base (1 seed) | 0.125 [0.000, 0.250] |")
    assert lines[3].startswith("| GRPO (3 seeds) | 0.250 [0.250, 0.250] |")
    assert lines[4].startswith("| GRPO + entropy advantage (3 seeds) | 0.500 [0.500, 0.500] |")
    # Differences 0, 0.25 and 0.5: mean 0.25, standard deviation 0.25; t(2) = 4.303, so +- 4.303 * 0.25 / sqrt(3).
    assert lines[6].startswith("| difference, interval over 3 seeds | +0.250 [-0.371, +0.871] |")
    assert any(line.startswith("| GRPO + entropy advantage, seed 2 | 0.750 |") for line in lines)


def test_arms_have_file_names_that_do_not_collide():
    assert len({key(arm, 1) for arm in ("base", *ARMS)}) == 1 + len(ARMS)
    assert key("GRPO", 0) == "grpo-0" and key("GRPO + entropy advantage", 2) == "grpo-entropy-advantage-2"


@pytest.mark.parametrize("arm", list(ARMS))
def test_read_does_not_mix_arms(tmp_path, arm):
    for other in ARMS:
        save(tmp_path, other, 0, [1])
    save(tmp_path, arm, 1, [2])
    assert [r["solved"] for r in read(tmp_path, arm)] == [[1], [2]]
