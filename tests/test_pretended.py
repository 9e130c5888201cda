"""The whole program on the pretended CUDA device, beside the same on the CPU: no operation mixes
devices or reads memory that nothing wrote, decode steps run as (emulated) CUDA graphs, and numbers
are the CPU's. The work is in tests/pretended_work.py."""

import json

import pytest

from pretended import FEW_PROBLEMS, ROOT, pretended_python


def work(call: str) -> dict:
    """The last line that pretended_work prints."""
    source = f"sys.path.append({str(ROOT / 'tests')!r}); import pretended_work as work; work.{call}"
    return json.loads(pretended_python(FEW_PROBLEMS + source).splitlines()[-1])


def test_the_sampler_draws_what_the_cpu_draws():
    """Over refills, growths, tails, top-p, and a second call after free(), as graphs; the cases are
    there indeed."""
    found = work("sampler()")
    assert found.pop("mixes devices") is False
    assert len(found) == 4
    for name, kind in found.items():
        assert kind["failed"] is None, name
        assert kind["captured"] >= 4, name  # at least two shapes in each of the calls
        assert kind["grown"] >= 2 and kind["shrunk"] >= 2, name
        assert kind["sequences"] == 30
        assert 0 < kind["ended"] < 30, name
        if name.startswith("float32"):
            assert kind["differing"] == 0, name
            assert kind["apart"] < 1e-4, name
        else:  # a rounding may tip a token, and all after it
            assert kind["differing"] <= 6, name
            assert kind["apart"] < 0.1, name


def test_an_update_moves_the_weights_as_on_the_cpu():
    """Loss, gradient norm and gradient, of policy and critic, in all precisions."""
    found = work("update()")
    assert len(found) == 4 + 2 * 4
    for name, apart in found.items():
        exact = "float32" in name or "recompute" in name
        assert apart["of"] > 1e-3, name
        assert apart["loss"] < (1e-6 if exact else 1e-2), name
        assert apart["grad_norm"] < (1e-5 if exact else 3e-2), name
        assert apart["gradient"] < (1e-4 if exact else 5e-2), name


def test_a_killed_run_goes_on_and_its_model_is_evaluated_and_analyzed(tmp_path):
    """A resumed run's state is that of one made in one go, bit for bit. What evaluate.py counts is
    what it counts on the CPU, and lab/analyze.py's report says the same."""
    with pytest.raises(RuntimeError, match="exit code -9"):
        work(f"start_and_die({str(tmp_path)!r})")
    found = work(f"resume({str(tmp_path)!r})")
    for name in ("grpo", "ppo", "bfloat16"):
        assert found[f"{name}: steps before"] == [1, 2]
        assert found[f"{name}: steps"] == [1, 2, 3]
        assert found[f"{name}: differing"] == []
        assert found[f"{name}: tensors"] > 100

    card, cpu = found["evaluate, cuda"], found["evaluate, cpu"]
    assert len(cpu) == 3  # two models and their difference
    assert same(card, cpu)

    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    card, cpu = found["analyze, cuda"], found["analyze, cpu"]
    assert cpu["comparisons"]["pivotal tokens"]
    assert same(card, cpu)


def same(a, b) -> bool:
    """Equal, numbers but for roundings."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=1e-3, abs=1e-4, nan_ok=True)
    return a == b
