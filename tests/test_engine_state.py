"""The engine's state: every ZeRO stage and precision, 1 and 2 ranks, one into another; and a NaN on one rank."""

import itertools
import json

import engines
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastsskd import engine_state
from fastsskd.errors import InputError


@pytest.fixture(scope="module")
def states(training, tmp_path_factory):
    """Folder with the saved states and with what was found before and after them; real DeepSpeed engines."""
    folder = tmp_path_factory.mktemp("states")
    for function in ("engines.train_and_save", "engines.load_and_train"):
        for ranks in (1, 2):
            training.call(function, folder, ranks=ranks)
    return folder


def found(states, name):
    return json.loads((states / f"{name}.json").read_text())


def precision(kind):
    return kind.split(",")[0].split()[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_kind_of_engine_goes_on_with_the_very_same_losses(states, ranks):
    saved, loaded = found(states, f"saved by {ranks}"), found(states, f"loaded by {ranks}")
    for kind in engines.KINDS:
        assert loaded[f"{ranks} {kind} -> {ranks} {kind}"]["losses"] == saved[kind]["losses"][engines.STEPS :], kind


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_ranks_and_other_stages_go_on_within_rounding(states, ranks):
    """Also with gradients summed in float32, padded parameters, and ZeRO-3's parameters that stay whole."""
    saved, loaded = found(states, f"saved by {3 - ranks}"), found(states, f"loaded by {ranks}")
    for before, after, same_ranks in engines.pairs():
        if same_ranks:
            continue
        # fp16's own limit: a gradient that just overflows on 2 ranks may not on 1, and the loss scales part.
        tolerance = {"fp32": 5e-7, "bf16": 5e-6, "fp16": 0.1}[precision(before)]
        losses = loaded[f"{3 - ranks} {before} -> {ranks} {after}"]["losses"]
        assert losses == pytest.approx(saved[before]["losses"][engines.STEPS :], abs=tolerance), (before, after)


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_precisions_go_on_from_the_float32_master_weights(states, ranks):
    saved, loaded = found(states, f"saved by {ranks}"), found(states, f"loaded by {ranks}")
    for before, after in engines.OTHER_PRECISION:
        losses = loaded[f"{ranks} {before} -> {ranks} {after}"]["losses"]
        assert losses == pytest.approx(saved[before]["losses"][engines.STEPS :], abs=0.05), (before, after)


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_counters_and_loss_scale_come_back(states, ranks):
    loaded = found(states, f"loaded by {ranks}")
    for before, after, same_ranks in engines.pairs():
        if precision(before) == precision(after):
            assert loaded[f"{ranks if same_ranks else 3 - ranks} {before} -> {ranks} {after}"]["again"], (before, after)
    about = json.loads((states / f"{ranks} 3 fp16" / "about0.json").read_text())
    assert about["global_steps"] == engines.STEPS and about["skipped_steps"] > 0
    assert about["optimizer_steps"] == engines.STEPS - about["skipped_steps"]
    assert 1 < about["loss_scale"]["cur_scale"] < 2**18


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_nan_on_one_rank_changes_nothing_on_any(states, ranks):
    """Bit for bit: master weights, moments, steps and the model's own weights; training then goes on."""
    for kind, seen in found(states, f"saved by {ranks}").items():
        assert seen["skipped"] and seen["same"], kind
        assert 0 < seen["after_nan"] < 2, kind


def test_each_rank_writes_its_share_and_every_element_is_written_once(states):
    for ranks in (1, 2):
        for kind in engines.KINDS:
            folder = states / f"{ranks} {kind}"
            files = sorted(folder.glob("*.safetensors"))
            assert len(files) == ranks
            places, sizes = {}, []
            for file in files:
                with safe_open(file, framework="pt") as opened:
                    shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
                sizes.append(sum(shape[0] for shape in shapes.values()))
                for key, (length,) in shapes.items():
                    place, name = key.split("/")
                    kind_of_value, start = place.split("@")
                    places.setdefault((kind_of_value, name), []).append((int(start), int(start) + length))
            about = json.loads((folder / "about0.json").read_text())
            assert set(places) == {(v, n) for v in ("master", "exp_avg", "exp_avg_sq") for n in about["parameters"]}
            for (_, name), own in places.items():
                own.sort()
                assert own[0][0] == 0 and own[-1][1] == about["parameters"][name]
                assert all(a[1] == b[0] for a, b in itertools.pairwise(own))
            assert max(sizes) - min(sizes) < 0.35 * sum(sizes)  # the parameters are tiny, and of odd sizes


# ------------------------------------------------------------------------------------------- without DeepSpeed's engine


def test_a_state_goes_into_a_fresh_engine(tmp_path):
    old, new = engines.Plain(), engines.Plain(steps=0)
    file = engine_state.save(old, tmp_path)
    engine_state.load(new, [file], engine_state.describe(old))
    for name, p in old.module.items():
        assert torch.equal(new.module[name], p)
        for key, value in old.optimizer.state[p].items():
            assert torch.equal(new.optimizer.state[new.module[name]][key], value), key
    assert new.global_steps == 2 and new.micro_steps == 6


def test_an_engine_that_never_took_a_step_can_be_saved(tmp_path):
    old, new = engines.Plain(steps=0), engines.Plain()
    about = engine_state.describe(old)
    assert about["optimizer_steps"] == 0
    engine_state.load(new, [engine_state.save(old, tmp_path)], about)
    assert int(new.optimizer.state[new.module["p0"]]["step"]) == 0 and torch.equal(new.module["p0"], old.module["p0"])


def test_other_parameters_are_refused(tmp_path):
    old = engines.Plain()
    file, about = engine_state.save(old, tmp_path), engine_state.describe(old)
    for sizes, text in (
        ((6, 1, 2), "p2: none there, 2 here"),
        ((6,), "p1: 1 there, none here"),
        ((6, 2), "1 there, 2"),
    ):
        with pytest.raises(InputError, match=text) as caught:
            engine_state.load(engines.Plain(sizes), [file], about)
        assert "\n" not in str(caught.value)


def test_a_part_that_is_in_no_file_is_missed(tmp_path):
    old = engines.Plain()
    file = engine_state.save(old, tmp_path)
    values = load_file(file)
    values["exp_avg@4/p0"] = values.pop("exp_avg@0/p0")[4:].clone()
    save_file(values, file)
    with pytest.raises(InputError, match="lack 4 elements of exp_avg of p0"):
        engine_state.load(engines.Plain(), [file], engine_state.describe(old))
