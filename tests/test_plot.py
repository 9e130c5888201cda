"""lab/plot.py: what is drawn together, the numbers behind the lines, and the pictures themselves."""

import dataclasses
import json

import numpy as np
import pytest

from lab.plot import band, by_settings, draw, pass_curve, read_run
from train import Settings


def make_run(folder, seed=0, offset=0.0, finished=True, **changes):
    folder.mkdir(parents=True)
    s = Settings(seed=seed, name=folder.name, **changes)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(s)))
    line = dict(length=50.0, entropy=0.5, shaping=0.1, clip_low=0.25, clip_high=0.5)
    (folder / "log.jsonl").write_text("".join(json.dumps(line | {"step": i, "reward": i / 10 + offset}) + "\n" for i in (1, 2, 3)))
    (folder / "validation.jsonl").write_text(json.dumps({"step": 0, "solved": [1, 3], "samples": 8}) + "\n")
    if finished:
        models = {"base": {"solved": [0, 2], "samples": 4}, "trained": {"solved": [2, 4], "samples": 4}}
        (folder / "validation.json").write_text(json.dumps({"models": models}))
    return folder


def test_runs_of_the_same_settings_are_one_line_with_a_band(tmp_path):
    runs = [read_run(make_run(tmp_path / name, seed, offset, alpha=alpha))
            for name, seed, offset, alpha in (("a", 0, 0.0, 0.0), ("b", 1, 0.3, 0.0), ("c", 0, 0.0, 0.4))]
    groups = by_settings(runs)
    assert list(groups) == ["grpo, alpha 0.0 (2 runs)", "grpo, alpha 0.4 (1 run)"]
    got = band([run["curves"]["reward"] for run in groups["grpo, alpha 0.0 (2 runs)"]])
    assert got == pytest.approx(np.array([[1, 0.25, 0.1, 0.4], [2, 0.35, 0.2, 0.5], [3, 0.45, 0.3, 0.6]]))
    assert runs[0]["curves"]["clipped"] == {1: 0.75, 2: 0.75, 3: 0.75} and runs[0]["curves"]["validation"] == {0: 0.25}
    short = band([{1: 0.0, 2: 2.0}, {2: 4.0}])                              # a run that is not as far yet
    assert short.tolist() == [[2, 3, 2, 4]]
    assert band([{1: None, 2: 2.0}]).tolist() == [[2, 2, 2, 2]]             # while only the critic learns


def test_pass_at_k_curve_by_hand(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    base = pass_curve([run], "base")                                        # c = 0 and 2 of 4: Pass@2 is (0 + 5/6) / 2
    assert base[:, :2] == pytest.approx(np.array([[1, 0.25], [2, 5 / 12], [4, 0.5]]))
    assert (base[:, 2] <= base[:, 1]).all() and (base[:, 1] <= base[:, 3]).all()


def test_pictures_are_drawn(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")
    groups = by_settings([read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", finished=False, kappa=4.0))])
    curves, passes = draw(groups, tmp_path / "figures")
    for file in (curves, passes):
        image = matplotlib.image.imread(file)
        assert min(image.shape[:2]) > 500 and 0.001 < (image[..., :3].mean(-1) < 0.9).mean() < 0.5     # drawn, not blank
        assert np.ptp(image[..., :3], axis=-1).max() < 0.05                 # grey: nothing depends on colour
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["curves.png", "pass_at_k.png"]
    only = by_settings([read_run(make_run(tmp_path / "c", finished=False))])
    assert len(draw(only, tmp_path / "other")) == 1


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder: it has no config.json"):
        read_run(tmp_path)
    folder = make_run(tmp_path / "a")
    assert list(read_run(folder)["curves"]["reward"]) == [1, 2, 3]
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 4, "rew')                                       # a kill while it was written
    assert list(read_run(folder)["curves"]["reward"]) == [1, 2, 3]
    (folder / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="not written by this version"):
        read_run(folder)
