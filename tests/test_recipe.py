"""Whole runs, small: what they leave behind, and the same losses on any ranks, ZeRO stage and precision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import losses
from vit_files import google_arrays

from fastsskd import manifest
from fastsskd.evaluation import score_file
from fastsskd.weights import load_model


@pytest.fixture(scope="session")
def finished(training, tones, tmp_path_factory):
    """A run of one rank in float32 with a teacher, two iterations: folder, metrics, result, printed text."""
    out = tmp_path_factory.mktemp("runs") / "one"
    options = {"recipe__iterations": 2, "distill__teacher": '"supervised"', "augment__mixup": 0.5}
    options["run__pictures_every"] = 1
    return out, *training.run(out, tones, pictures=True, **options)


def test_a_run_leaves_what_the_interface_promises(finished):
    out, lines, result, printed = finished
    for name in ("config.toml", "ds_config.json", "metrics.jsonl", "result.json", "plots/losses.png"):
        assert (out / name).stat().st_size > 0, name
    assert (out / "plots/iter1-ssl-views.png").exists()
    assert result["status"] == "complete" and result["seed"] == 0 and result["versions"]["torch"]
    assert [iteration["iteration"] for iteration in result["iterations"]] == [1, 2]
    assert result["num_ssl"] == result["num_train"] == 32 and result["num_eval"] == 8 and result["skipped"] == {}
    for iteration in result["iterations"]:
        assert iteration["metrics"]["num_clips"] == 8
        eight = {f"{term}_{view}" for term in ("restore", "mse", "kl", "contrast") for view in ("intra", "inter")}
        assert eight <= iteration["ssl"]["losses"].keys()
        assert {"label", "teacher_label", "regression"} <= iteration["distill"]["losses"].keys()
    names = {"teacher", "iter1-distill", "iter2-distill", "ensemble"}
    scores = {path.stem: score_file.load(path) for path in (out / "scores").iterdir()}
    assert scores.keys() == names
    for name, metrics in (("iter2-distill", result["metrics"]), ("ensemble", result["ensemble"])):
        own = scores[name]
        assert metrics["accuracy"] == np.mean(own.probs.argmax(axis=1) == own.label) and len(own.key) == 8
    stages = ["teacher", "iter1-ssl", "iter1-distill", "iter2-ssl", "iter2-distill"]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == stages
    assert "ensemble" in printed and "clips/s" in printed and "left" in printed


def test_multi_ssl_is_watched_and_drawn(finished):
    out, lines, result, printed = finished
    own = [line for line in lines if line["stage"].endswith("-ssl")]
    for line in own:
        assert 0 < line["effective_rank"] <= line["rank_limit"] == 7  # 8 clips a step
        assert line["contrast_chance"] == pytest.approx(1 / 8)
        assert 0 <= line["contrast_accuracy_inter"] <= 1 and line["explained_intra"] < 1
        assert not any(name.startswith("variance") for name in line)
    first = result["iterations"][0]["ssl"]
    assert {"effective_rank", "explained_inter"} <= first["health"].keys()
    assert not set(first["losses"]) & {"effective_rank", "explained_inter", "feature_std"}
    assert "effective rank" in printed and "effective_rank" not in lines[0]  # the teacher's stage has none
    pictures = {path.name for path in (out / "plots").glob("*-views*.png")}
    assert pictures == {f"iter{k}-ssl-views{when}.png" for k in (1, 2) for when in ("-epoch001", "")}


def test_learning_rate_falls_by_a_fifth_after_each_iteration(finished):
    _, lines, _, _ = finished
    peak = {stage: max(line["lr"] for line in lines if line["stage"] == stage) for stage in ("iter1-ssl", "iter2-ssl")}
    assert peak["iter2-ssl"] / peak["iter1-ssl"] == pytest.approx(0.8)


def test_it_learns(finished):
    _, lines, result, _ = finished
    own = [line["loss"] for line in lines if line["stage"] == "iter1-ssl"]
    assert np.mean(own[-2:]) < np.mean(own[:2])
    assert result["metrics"]["accuracy"] >= 0.75  # two tones: chance is 0.5


def test_evaluate_command_gives_the_runs_own_metrics(finished, tones):
    out, _, result, _ = finished
    from fastsskd import cli
    from fastsskd.evaluation.evaluate import evaluate
    from fastsskd.manifest import split

    _, held_out = split(manifest.load(tones))
    metrics = evaluate([out / "checkpoints/iter2-distill"], held_out)
    assert metrics["accuracy"] == result["metrics"]["accuracy"] and metrics["mAP"] == result["metrics"]["mAP"]
    both = [str(out / f"checkpoints/iter{k}-distill/model.safetensors") for k in (1, 2)]
    ensemble = evaluate(both, held_out)
    assert ensemble["mAP"] == result["ensemble"]["mAP"]
    assert cli.main(["evaluate", "--checkpoint", *both, str(tones)]) == 0


def test_two_ranks_give_the_losses_of_one(training, finished, tones, tmp_path):
    """The contrast's negatives are those of the whole batch, whoever holds them."""
    _, lines, result, _ = finished
    options = {"recipe__iterations": 2, "distill__teacher": '"supervised"', "augment__mixup": 0.5}
    two, result_two, _ = training.run(tmp_path / "two", tones, ranks=2, **options)
    one = losses(lines)
    assert losses(two).keys() == one.keys()
    for step, loss in losses(two).items():
        assert loss == pytest.approx(one[step], abs=2e-5), step
    for a, b in zip(lines, two, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        for name in ("effective_rank", "rank_limit", "explained_intra", "explained_inter", "contrast_chance"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-2, abs=1e-3), name
    assert result_two["metrics"]["num_clips"] == result["metrics"]["num_clips"] == 8
    assert result_two["metrics"]["mAP"] == pytest.approx(result["metrics"]["mAP"], abs=1e-6)


def test_stochastic_depth_leaves_out_the_same_blocks_on_two_ranks(training, tones, tmp_path):
    options = {"recipe__stages": '["distill"]', "distill__epochs": 3, "model__drop_path": 0.4}
    one, two = (losses(training.run(tmp_path / str(n), tones, ranks=n, **options)[0]) for n in (1, 2))
    without = losses(training.run(tmp_path / "without", tones, **{**options, "model__drop_path": 0.0})[0])
    assert one.keys() == two.keys() == without.keys()
    assert all(loss == pytest.approx(one[step], abs=2e-5) for step, loss in two.items())
    assert any(abs(loss - one[step]) > 1e-3 for step, loss in without.items())


@pytest.fixture(scope="session")
def kinds(training, finished, tones, tmp_path_factory):
    """A function that runs with a frozen teacher on some ranks in some way, once each; losses and exported weights."""
    folder, done = tmp_path_factory.mktemp("kinds"), {}
    teacher = json.dumps(str(finished[0] / "checkpoints/iter1-distill"))
    options = {"ssl__epochs": 1, "distill__epochs": 1, "distill__teacher": teacher}

    def run(ranks, stage, precision="fp32", **more):
        key = (ranks, stage, precision, *more.items())
        if key not in done:
            out = folder / str(len(done))
            ds = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": more.pop("accumulation", 1)}
            if more.pop("unclipped", False):
                ds["gradient_clipping"] = 0.0
            if precision == "bf16":
                ds["bf16"] = {"enabled": True}
            lines, _, _ = training.run(out, tones, ranks=ranks, ds=ds, **options, **more)
            done[key] = losses(lines), load_file(out / "checkpoints/iter1-distill/model.safetensors")
        return done[key]

    return run


AHEAD = {"distill__teacher_ahead": "true"}
UNCLIPPED = {"unclipped": True}  # ZeRO-3 adds the norm up in another order, and its last digit scales all gradients
CLONES = {"mask__clones": 2}
RECOMPUTE = {"model__activation_checkpointing": "true"}


@pytest.mark.parametrize(
    ("kind", "like", "tolerance"),
    [
        # fp32, on one rank and on two: like ZeRO-1 on one rank.
        (((1, 0), {}), ((1, 1), {}), 1e-6),
        (((1, 2), {}), ((1, 1), {}), 0),
        (((1, 3), {}), ((1, 1), {}), 1e-6),
        (((2, 0), {}), ((1, 1), {}), 1e-5),
        (((2, 1), {}), ((1, 1), {}), 1e-5),
        (((2, 2), {}), ((2, 1), {}), 0),
        (((2, 3), {}), ((1, 1), {}), 1e-5),
        # bf16: near to fp32, and the same numbers at every stage.
        (((1, 1, "bf16"), {}), ((1, 1), {}), 0.2),
        (((1, 2, "bf16"), {}), ((1, 1, "bf16"), {}), 0),
        (((1, 3, "bf16"), UNCLIPPED), ((1, 1, "bf16"), UNCLIPPED), 0),
        (((2, 1, "bf16"), {}), ((1, 1), {}), 0.2),
        (((2, 2, "bf16"), {}), ((2, 1, "bf16"), {}), 0),
        (((2, 3, "bf16"), UNCLIPPED), ((2, 1, "bf16"), UNCLIPPED), 0),
        # Accumulation against ranks; the contrast's negatives are those of the whole step.
        (((1, 1), {"accumulation": 2}), ((1, 1), {}), 1e-5),
        (((1, 3), {"accumulation": 2}), ((1, 1), {}), 1e-5),
        (((1, 1, "bf16"), {"accumulation": 2}), ((1, 1, "bf16"), {}), 0.05),
        (((2, 0), {"accumulation": 2}), ((1, 1), {}), 1e-5),
        (((2, 2), {"accumulation": 2}), ((1, 1), {}), 1e-5),
        (((2, 3), {"accumulation": 2}), ((1, 1), {}), 1e-5),
        (((2, 3), {"accumulation": 2, **RECOMPUTE}), ((1, 1), {}), 1e-5),
        (((2, 1), {"accumulation": 2, **CLONES}), ((1, 1), CLONES), 1e-5),
        # A teacher that hears all micro-batches of a step at once.
        (((1, 1), {"accumulation": 2, **AHEAD}), ((1, 1), {}), 1e-5),
        (((2, 2), {"accumulation": 2, **AHEAD}), ((1, 1), {}), 1e-5),
        # Blocks that are computed again in the backward pass.
        (((1, 1), RECOMPUTE), ((1, 1), {}), 0),
        (((2, 3), RECOMPUTE), ((2, 3), {}), 0),
        (((1, 1, "bf16"), RECOMPUTE), ((1, 1, "bf16"), {}), 0),
    ],
)
def test_the_losses_do_not_depend_on_how_it_is_computed(kinds, kind, like, tolerance):
    """Of the Multi-SSL stage, and of a student under a frozen teacher, whose numbers ZeRO must leave alone."""
    (own, state), (expected, weights) = (kinds(*where, **dict(options)) for where, options in (kind, like))
    assert own.keys() == expected.keys() and len(own) == 8
    for step, loss in expected.items():
        assert own[step] == pytest.approx(loss, abs=tolerance, rel=0), step
    if tolerance < 0.01:
        worst = max((state[name] - weights[name]).abs().max().item() for name in weights)
        assert worst <= (2e-4 if tolerance else 1e-6)  # AdamW's first steps make much of a last bit
    if "bf16" in kind[0]:  # the exported weights are the float32 master copy
        assert any((value.bfloat16().float() != value).any() for value in state.values())


@pytest.mark.parametrize(
    ("ranks", "stage", "precision", "pooling"),
    [
        (1, 0, "fp32", "mean"),
        (1, 1, "fp32", "attentive"),
        (2, 1, "fp32", "mean"),
        (1, 2, "bf16", "attentive"),
        (2, 3, "fp32", "attentive"),
        (1, 3, "bf16", "mean"),
    ],
)
def test_a_linear_probe_changes_the_head_alone(finished, training, tones, tmp_path, ranks, stage, precision, pooling):
    start = finished[0] / "checkpoints/iter1-ssl"
    ds = {"zero_optimization": {"stage": stage}, **({"bf16": {"enabled": True}} if precision == "bf16" else {})}
    options = {"recipe__stages": '["distill"]', "distill__frozen": "true", "distill__lr": 2e-2, "distill__ema": 0.5}
    options |= {"model__init": json.dumps(str(start)), "model__pooling": json.dumps(pooling)}
    lines, result, _ = training.run(tmp_path / "probe", tones, ranks=ranks, ds=ds, distill__epochs=4, **options)
    assert np.mean([line["loss"] for line in lines][-2:]) < 0.9 * lines[0]["loss"]
    before = load_file(start / "model.safetensors")
    after = load_file(tmp_path / "probe/checkpoints/iter1-distill/model.safetensors")
    for name, value in after.items():
        if name.startswith(("head.", "pool.")):
            assert not (name in before and torch.equal(value, before[name])), name
        else:
            assert torch.equal(value, before[name]), name
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == ({"pool"} if pooling != "mean" else set())
    model, info = load_model(tmp_path / "probe/checkpoints/iter1-distill")
    assert info.pooling == model.pooling == pooling and result["status"] == "complete"


def test_a_killed_linear_probe_goes_on(finished, training, tones, tmp_path):
    options = {"recipe__stages": '["distill"]', "distill__frozen": "true", "run__checkpoint_every": 4}
    options |= {"model__init": json.dumps(str(finished[0] / "checkpoints/iter1-ssl")), "model__pooling": '"attentive"'}
    whole, _, _ = training.run(tmp_path / "whole", tones, distill__epochs=3, **options)
    harm = [{"do": "kill", "function": "fastsskd.engine._optimize", "calls": [10]}]
    training.start(tmp_path / "cut", tones, harm=harm, distill__epochs=3, **options).wait()
    lines, _, printed = training.run(tmp_path / "cut", tones, resume=True, distill__epochs=3, **options)
    assert "continues from step 8 " in printed and losses(lines) == losses(whole)
    files = [load_file(tmp_path / name / "checkpoints/iter1-distill/model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_attentive_pooling_goes_from_stage_to_stage_and_teaches(training, tones, tmp_path):
    options = {"recipe__iterations": 2, "distill__teacher": '"previous"', "model__pooling": '"attentive"'}
    lines, result, _ = training.run(tmp_path / "run", tones, ssl__epochs=1, distill__epochs=1, **options)
    assert result["status"] == "complete" and lines[-1]["regression"] > 0
    states = [
        load_file(tmp_path / f"run/checkpoints/{name}/model.safetensors") for name in ("iter1-distill", "iter2-ssl")
    ]
    assert all(
        torch.equal(states[0][name], states[1][name]) for name in states[0] if name.startswith(("pool.", "head."))
    )


def test_a_corrupt_clip_is_named_at_the_end(training, tones, tmp_path):
    table = manifest.load(tones)
    folder = tmp_path / "clips"
    for i in range(len(table)):
        path = folder / table.path(i).parent.name / table.path(i).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(table.path(i).read_bytes()[: 900 if i == 3 else None])
    _, result, printed = training.run(tmp_path / "run", folder, ssl__epochs=1, distill__epochs=1)
    assert result["status"] == "complete" and len(result["skipped"]) == 1
    (key,) = result["skipped"]
    assert Path(key).stem == table.path(3).stem and key in printed


def test_an_spfa_teacher_starts_from_a_vit_and_then_teaches(training, tones, tmp_path):
    """Labels only, with SimAM; the file says so, and a student's run takes it as it is."""
    np.savez(tmp_path / "vit.npz", **google_arrays())
    labels = {"recipe__stages": '["distill"]', "distill__epochs": 1}
    start = {"model__attention": '"simam"', "model__init": json.dumps(str(tmp_path / "vit.npz"))}
    _, result, printed = training.run(tmp_path / "spfa", tones, **labels, **start)
    assert result["status"] == "complete"
    assert "a ViT for pictures, Google's .npz, 64 wide, 2 blocks, 4 x 4 positions: 27 loaded, 2 resized" in printed
    table = [line.split("\t") for line in (tmp_path / "spfa/start-iter1-distill.tsv").read_text().splitlines()[1:]]
    path = tmp_path / "spfa/checkpoints/iter1-distill"
    model, info = load_model(path)
    assert info.attention == model.attention == "simam"
    assert {line[1] for line in table if line[0] != "ignored"} == model.state_dict().keys()
    assert {name for line in table for name in line[2].split()} == google_arrays().keys()
    teacher = {"distill__teacher": json.dumps(str(path))}
    lines, result, _ = training.run(tmp_path / "student", tones, **labels, **teacher)
    assert result["status"] == "complete" and lines[-1]["regression"] > 0
    assert load_model(tmp_path / "student/checkpoints/iter1-distill")[1].attention == "plain"


def test_a_start_that_cannot_be_ends_the_run_before_its_folder_is_claimed(training, tones, tmp_path):
    _, _, printed = training.run(tmp_path / "run", tones, expect=1, model__init='"imagenet"')
    assert "error: model.init = 'imagenet': nothing is downloaded here;" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_self_supervision_alone_needs_no_labels(training, tones, tmp_path):
    table = manifest.load(tones)
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(len(table)):
        (folder / f"{i:02d}.wav").write_bytes(table.path(i).read_bytes())
    _, result, _ = training.run(tmp_path / "run", folder, recipe__stages='["ssl"]', ssl__epochs=1)
    assert result["status"] == "complete" and result["metrics"] is None
    state = load_file(tmp_path / "run/checkpoints/iter1-ssl/model.safetensors")
    assert "blocks.0.attn.qkv.weight" in state and not any(name.startswith("head.") for name in state)
    # Its weights start a labelled run, whose head is fresh.
    init = json.dumps(str(tmp_path / "run/checkpoints/iter1-ssl"))
    stages = {"recipe__stages": '["distill"]', "distill__epochs": 1, "model__init": init}
    _, result, printed = training.run(tmp_path / "labelled", tones, **stages)
    assert result["metrics"]["num_clips"] == 8 and "4 missing" in printed
