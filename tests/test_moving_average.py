"""The weights' moving average, against its formula in plain numbers: every ZeRO stage and precision, 1 and 2 ranks."""

import json

import engines
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import losses

from fastsskd import engine_state, manifest
from fastsskd.errors import InputError
from fastsskd.evaluation.evaluate import evaluate
from fastsskd.manifest import split
from fastsskd.moving_average import MovingAverage, decay_at


@pytest.fixture(scope="module")
def followed(training, tmp_path_factory):
    """Folder with what was seen of real DeepSpeed engines, before and after their states were saved."""
    folder = tmp_path_factory.mktemp("averages")
    for function in ("engines.follow_and_save", "engines.load_and_follow"):
        for ranks in (1, 2):
            training.call(function, folder, ranks=ranks)
    return folder


def found(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def expected_average(seen: list[dict]) -> np.ndarray:
    """Begins as the weights; after each good step it moves towards them."""
    average, step = np.array(seen[0]["weights"]), 0
    for after in seen[1:]:
        if after["good"]:
            step += 1
            decay = min(engines.DECAY, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * np.array(after["weights"])
    return average


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_the_formula_s_average_of_the_float32_weights(followed, ranks):
    for kind, seen in found(followed, f"followed by {ranks}").items():
        np.testing.assert_allclose(seen[-1]["average"], expected_average(seen), rtol=0, atol=2e-7, err_msg=kind)
        assert seen[0]["average"] == seen[0]["weights"]
        moved = np.abs(np.array(seen[-1]["average"]) - np.array(seen[-1]["weights"])).max()
        assert moved > 1e-3, kind  # or the comparison would say little


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_step_does_not_move_it(followed, ranks):
    for kind, seen in found(followed, f"followed by {ranks}").items():
        assert not seen[2]["good"] and seen[2]["average"] == seen[1]["average"], kind
        good = [number for number in range(1, len(seen)) if seen[number]["good"]]
        assert all(seen[n]["average"] != seen[n - 1]["average"] for n in good), kind


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_kind_of_engine_goes_on_with_the_very_same_average(followed, ranks):
    before, after = found(followed, f"followed by {ranks}"), found(followed, f"went on by {ranks}")
    for kind in engines.KINDS:
        begin, end = after[f"{ranks} {kind} -> {ranks} {kind}"]
        assert begin == {name: before[kind][engines.STEPS][name] for name in begin}, kind
        assert end == {name: before[kind][-1][name] for name in end}, kind


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_ranks_stages_and_precisions_take_it_over_bit_for_bit(followed, ranks):
    after = found(followed, f"went on by {ranks}")
    before = {n: found(followed, f"followed by {n}") for n in (1, 2)}
    for saved, kind, same_ranks in engines.pairs():
        source = ranks if same_ranks else 3 - ranks
        begin, end = after[f"{source} {saved} -> {ranks} {kind}"]
        assert begin["average"] == before[source][saved][engines.STEPS]["average"], (saved, kind)
        if {saved.split(",")[0].split()[1], kind.split(",")[0].split()[1]} == {"fp32"}:
            np.testing.assert_allclose(end["average"], before[source][saved][-1]["average"], rtol=0, atol=1e-5)


def test_two_ranks_have_the_average_of_one(followed):
    one, two = (found(followed, f"followed by {n}") for n in (1, 2))
    for kind in ("0 fp32", "1 fp32", "2 fp32", "3 fp32"):
        np.testing.assert_allclose(two[kind][-1]["average"], one[kind][-1]["average"], rtol=0, atol=1e-5, err_msg=kind)


# --------------------------------------------------------------------------------------------------------- whole runs

LABELS = {"recipe__stages": '["distill"]', "distill__epochs": 3, "run__checkpoint_every": 4}


def model_of(out) -> dict:
    return load_file(out / "checkpoints/iter1-distill/model.safetensors")


@pytest.fixture(scope="module")
def averaged(training, tones, tmp_path_factory):
    """Folder and result of a run that nothing happens to, of one rank."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    lines, result, _ = training.run(out, tones, distill__ema=0.8, **LABELS)
    return out, losses(lines), result


def test_what_is_evaluated_and_saved_is_the_average(training, tones, tmp_path, averaged):
    out, own, result = averaged
    lines, _, _ = training.run(tmp_path / "without", tones, **LABELS)
    assert losses(lines) == own  # training itself goes on with the weights
    without = model_of(tmp_path / "without")
    assert any((value - without[name]).abs().max() > 1e-4 for name, value in model_of(out).items())
    assert result["metrics"]["weights"] == {"select": "last", "epochs": [], "ema": 0.8}
    _, held_out = split(manifest.load(tones))
    assert evaluate([out / "checkpoints/iter1-distill"], held_out)["mAP"] == result["metrics"]["mAP"]


def test_a_killed_run_ends_with_the_same_average(training, tones, tmp_path, averaged):
    out = tmp_path / "run"
    harm = [{"do": "kill", "function": "fastsskd.engine._optimize", "calls": [10]}]
    training.start(out, tones, harm=harm, distill__ema=0.8, **LABELS).wait()
    lines, _, printed = training.run(out, tones, resume=True, distill__ema=0.8, **LABELS)
    assert "continues from step 8 " in printed and losses(lines) == averaged[1]
    expected = model_of(averaged[0])
    assert all(torch.equal(value, expected[name]) for name, value in model_of(out).items())


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (2, 3), (1, 0)])
def test_ranks_and_stages_make_the_same_model(training, tones, tmp_path, averaged, ranks, stage):
    ds = {"zero_optimization": {"stage": stage}}
    training.run(tmp_path / "run", tones, ranks=ranks, ds=ds, distill__ema=0.8, **LABELS)
    expected = model_of(averaged[0])
    assert max((value - expected[name]).abs().max() for name, value in model_of(tmp_path / "run").items()) < 2e-4


def test_a_checkpoint_from_before_the_average_is_refused(training, tones, tmp_path):
    out = tmp_path / "run"
    harm = [{"do": "kill", "function": "fastsskd.engine._optimize", "calls": [6]}]
    training.start(out, tones, harm=harm, **LABELS).wait()
    _, _, printed = training.run(out, tones, resume=True, expect=1, distill__ema=0.8, **LABELS)
    assert "no moving average of the weights; resume with the run's own distill.ema" in printed
    assert "Traceback" not in printed


def test_the_best_epoch_is_that_of_the_average(training, tones, tmp_path):
    options = {**LABELS, "distill__select": '"best"', "distill__ema": 0.8}
    _, result, _ = training.run(tmp_path / "run", tones, **options)
    note = result["metrics"]["weights"]
    assert note["value"] == result["metrics"]["accuracy"] and note["ema"] == 0.8 and len(note["epochs"]) == 1


# ------------------------------------------------------------------------------------------- without DeepSpeed's engine


def test_the_decay_grows_to_what_was_asked_for():
    assert [decay_at(step, 0.9999) for step in (1, 2, 8, 90)] == [2 / 11, 3 / 12, 0.5, 0.91]
    assert decay_at(10**9, 0.999) == decay_at(9000, 0.999) == 0.999 and decay_at(8000, 0.999) < 0.999


def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    old, new = engines.Plain(), engines.Plain()
    file, about = engine_state.save(old, tmp_path), engine_state.describe(old)
    engine_state.keep_average(new)
    with pytest.raises(InputError, match=r"no moving average of the weights; resume with the run's own distill\.ema"):
        engine_state.load(new, [file], about)


def test_an_average_that_is_not_asked_for_is_left_where_it_is(tmp_path):
    old, new = engines.Plain(), engines.Plain(steps=0)
    engine_state.keep_average(old)
    engine_state.load(new, [engine_state.save(old, tmp_path)], engine_state.describe(old))
    assert all(engine_state.AVERAGE not in state for state in new.optimizer.state.values())


def test_the_weights_come_back_after_an_error():
    own = engines.Plain()
    engine_state.keep_average(own)
    average = MovingAverage(own, 0.9)
    for p in own.module.values():
        p.data.add_(1.0)
    before = {name: p.detach().clone() for name, p in own.module.items()}
    with pytest.raises(RuntimeError), average.in_place():
        assert all((p < before[name]).all() for name, p in own.module.items())
        raise RuntimeError
    assert all((p == before[name]).all() for name, p in own.module.items())
