"""lab/plot.py: what is drawn together, the numbers behind the lines against figures by hand, and the
pictures themselves."""

import dataclasses
import json

import numpy as np
import pytest

from lab.plot import band, by_settings, draw, pass_curve, read_run
from plumbing.settings import Settings


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, ...) writes the folder of a run of three steps, and returns it. `offset` is
    added to all rewards; `changes` are settings."""

    def make(name, seed=0, offset=0.0, finished=True, **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = Settings(seed=seed, name=name, **changes)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))

        lines = []
        for step in (1, 2, 3):
            line = dict(length=50.0, entropy=0.5, shaping=0.1, clip_low=0.25, clip_high=0.5)
            lines.append(line | {"step": step, "reward": step / 10 + offset})
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

        validation = {"step": 0, "solved": [1, 3], "samples": 8}
        (folder / "validation.jsonl").write_text(json.dumps(validation) + "\n")
        if finished:
            base = {"solved": [0, 2], "samples": 4}
            trained = {"solved": [2, 4], "samples": 4}
            final = {"models": {"base": base, "trained": trained}}
            (folder / "validation.json").write_text(json.dumps(final))
        return folder

    return make


def test_runs_of_the_same_settings_are_one_line_with_a_band(make_run):
    runs = [
        read_run(make_run("a", seed=0, offset=0.0, alpha=0.0)),
        read_run(make_run("b", seed=1, offset=0.3, alpha=0.0)),
        read_run(make_run("c", seed=0, offset=0.0, alpha=0.4)),
    ]
    groups = by_settings(runs)
    assert list(groups) == ["grpo, alpha 0.0 (2 runs)", "grpo, alpha 0.4 (1 run)"]
    got = band([run["curves"]["reward"] for run in groups["grpo, alpha 0.0 (2 runs)"]])
    want = [[1, 0.25, 0.1, 0.4], [2, 0.35, 0.2, 0.5], [3, 0.45, 0.3, 0.6]]
    assert got == pytest.approx(np.array(want))
    assert runs[0]["curves"]["clipped"] == {1: 0.75, 2: 0.75, 3: 0.75}
    assert runs[0]["curves"]["validation"] == {0: 0.25}


def test_a_band_has_the_steps_that_all_runs_have_measured():
    not_as_far = band([{1: 0.0, 2: 2.0}, {2: 4.0}])
    assert not_as_far.tolist() == [[2, 3, 2, 4]]
    only_the_critic_learns = band([{1: None, 2: 2.0}])
    assert only_the_critic_learns.tolist() == [[2, 2, 2, 2]]


def test_pass_at_k_curve_by_hand(make_run):
    run = read_run(make_run("a"))
    base = pass_curve([run], "base")  # c = 0 and 2 of 4: Pass@2 is (0 + 5/6) / 2
    assert base[:, :2] == pytest.approx(np.array([[1, 0.25], [2, 5 / 12], [4, 0.5]]))
    _, mean, low, high = base.T
    assert (low <= mean).all() and (mean <= high).all()


def test_pictures_are_drawn(make_run, tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")
    finished = read_run(make_run("a"))
    unfinished = read_run(make_run("b", finished=False, kappa=4.0))
    curves, passes = draw(by_settings([finished, unfinished]), tmp_path / "figures")
    for file in (curves, passes):
        image = matplotlib.image.imread(file)
        assert min(image.shape[:2]) > 500
        pixels = image[..., :3]
        assert 0.001 < (pixels.mean(-1) < 0.9).mean() < 0.5  # drawn, not blank
        assert np.ptp(pixels, axis=-1).max() < 0.05  # grey: nothing depends on colour
    written = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert written == ["curves.png", "pass_at_k.png"]


def test_without_a_finished_run_there_is_one_picture(make_run, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    only = by_settings([read_run(make_run("c", finished=False))])
    assert len(draw(only, tmp_path / "other")) == 1


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder: it has no config.json"):
        read_run(tmp_path)


def test_a_line_that_a_kill_cut_is_left_out(make_run):
    folder = make_run("a")
    assert list(read_run(folder)["curves"]["reward"]) == [1, 2, 3]
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 4, "rew')
    assert list(read_run(folder)["curves"]["reward"]) == [1, 2, 3]


def test_a_run_of_another_version_is_named(make_run):
    folder = make_run("a")
    (folder / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="not written by this version"):
        read_run(folder)
