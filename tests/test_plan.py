"""Plans: time, communication and loading by hand, what they say of the paper, and the command as a user types it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import fails

from fastsskd import cli, config, ds_config, manifest
from fastsskd.ds_config import BatchSizes
from fastsskd.errors import InputError, UsageError
from fastsskd.hardware import GPUS
from fastsskd.model import SIZES
from fastsskd.plan import cost as plan_cost
from fastsskd.plan import job as plan_job
from fastsskd.plan import loader as plan_loader
from fastsskd.plan import report as plan_report
from fastsskd.plan.job import Clips
from fastsskd.plan.memory import zero_of
from fastsskd.plan.scale import ASSUMED, plan_at, split_batch, transfer_seconds

LAUNCH = Path(__file__).parents[1] / "launch"
TREE = {"train_batch_size": 256, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}


@pytest.fixture
def audioset():
    return config.load(LAUNCH / "configs" / "audioset2m.toml")


def make_job(audioset, gpu="A100-80", tree=TREE, **options):
    return plan_job.job(audioset, tree, Clips(2_000_000, 2_000_000, 527), GPUS[gpu], **options)


def test_a_step_on_one_gpu_by_hand(audioset):
    """Multi-SSL: a forward pass and two forward and backward ones, 7 times 97 GFLOP and some more, at 40 % of 312."""
    step = plan_at(make_job(audioset), 1).stages["ssl"]
    assert step.exposed == 0 and step.sent == 0 and step.bound == "compute"
    assert 256 * 7 * 96.6e9 / (0.40 * 312e12) < step.seconds < 256 * 7.6 * 96.6e9 / (0.40 * 312e12)
    assert step.clips_per_second == pytest.approx(256 / step.seconds)
    assert step.hours == pytest.approx(32 * (2_000_000 // 256) * step.seconds / 3600)
    labelled = plan_at(make_job(audioset), 1).stages["distill"]
    assert labelled.seconds == pytest.approx(step.seconds * 3 / 7.25, rel=0.03)


def test_a_teacher_costs_its_forward_pass_and_its_memory(audioset):
    taught = replace(audioset, distill=replace(audioset.distill, teacher=("one.pt", "two.pt")))
    without, with_two = (plan_at(make_job(one), 8) for one in (audioset, taught))
    ratio = with_two.stages["distill"].compute / without.stages["distill"].compute
    assert ratio == pytest.approx((3 + 2) / 3, rel=0.03)  # two of the base size
    assert make_job(taught).work["distill"].parameters.teacher == 2 * make_job(taught).work["ssl"].parameters.model
    assert with_two.memory[1].total == without.memory[1].total  # of Multi-SSL, the hungrier stage, which has none
    own = replace(audioset, distill=replace(audioset.distill, teacher="supervised"), recipe=replace(audioset.recipe))
    assert list(make_job(own).work) == ["ssl", "distill", "teacher"]
    assert plan_at(make_job(own), 8).teacher_hours > 0


def test_checkpointing_costs_a_forward_pass(audioset):
    again = replace(audioset, model=replace(audioset.model, activation_checkpointing=True))
    plain, checked = (plan_at(make_job(one), 1) for one in (audioset, again))
    assert checked.stages["ssl"].compute / plain.stages["ssl"].compute == pytest.approx(9.25 / 7.25, rel=0.02)
    assert checked.largest_micro > 3 * plain.largest_micro


def test_a_small_micro_batch_waits_for_the_host(audioset):
    steps = {gpus: plan_at(make_job(audioset, "H200"), gpus).stages["ssl"].compute for gpus in (64, 128, 256)}
    assert steps[256] > 0.4 * steps[64]  # 1 clip against 4


def test_batches_keep_the_files_total_as_long_as_they_can():
    assert split_batch(TREE, 8) == (BatchSizes(256, 32, 1), False)
    small = {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8}
    assert split_batch(small, 1) == (BatchSizes(256, 8, 32), False)
    assert split_batch(small, 64) == (BatchSizes(256, 4, 1), False)
    assert split_batch(small, 512) == (BatchSizes(4096, 8, 1), True)
    assert split_batch({"train_batch_size": 256}, 512) == (BatchSizes(512 * ASSUMED.micro, ASSUMED.micro, 1), True)
    assert split_batch({"train_micro_batch_size_per_gpu": 3}, 5) == (BatchSizes(15, 3, 1), False)
    fixed = {"train_batch_size": 24, "gradient_accumulation_steps": 5}
    assert split_batch(fixed, 4) == (BatchSizes(24, 6, 1), False)
    with pytest.raises(UsageError):
        split_batch({}, 4)


def test_communication_by_hand(audioset):
    job = make_job(audioset)
    assert transfer_seconds(job, 1e9, 1, 1) == 0
    inside, across = (transfer_seconds(job, 1e9, ranks, 1) for ranks in (8, 16))
    assert inside == pytest.approx(1e9 / (0.8 * 300e9) + 3 * 20e-6)
    assert across == pytest.approx(1e9 / (0.8 * 200e9) + 4 * 20e-6)
    one_a_node = replace(job, gpus_per_node=1)
    assert transfer_seconds(one_a_node, 1e9, 8, 1) == pytest.approx(1e9 / (0.8 * 200e9) + 3 * 20e-6)


def test_communication_hides_behind_the_backward_pass_only_if_the_file_says_so(audioset):
    """Of what is sent, a third is the weights, after the step, which hide behind nothing."""
    ways = [{"stage": 1}, {"stage": 1, "overlap_comm": True}]
    jobs = [make_job(audioset, tree={**TREE, "zero_optimization": way}) for way in ways]
    for network, hidden in ((5e9, None), (200e9, 2 / 3)):
        alone, beside = (plan_at(replace(job, gpu=replace(job.gpu, network=network)), 64) for job in jobs)
        alone, beside = (one.stages["distill"] for one in (alone, beside))
        behind = min(ASSUMED.hidden * 2 / 3 * alone.compute, 2 / 3 * alone.exposed)
        assert beside.exposed == pytest.approx(alone.exposed - behind, rel=0.05)
        if hidden:
            assert beside.exposed == pytest.approx((1 - hidden) * alone.exposed, rel=0.05)
        else:
            assert alone.bound == beside.bound == "communication"


def test_the_contrast_gathers_all_clips_features(audioset):
    off = replace(audioset, loss=replace(audioset.loss, contrast_intra=False, contrast_inter=False))
    with_, without = (plan_at(make_job(one), 64).stages["ssl"].sent for one in (audioset, off))
    assert with_ - without == 63 * 4 * 769 * 4  # the others' 4 clips each, 768 numbers and a flag; both views take them


def test_the_loader_counts_when_it_is_the_slowest(audioset):
    job = make_job(audioset)
    needy = replace(job, gpu=replace(job.gpu, cores=1), loader=replace(job.loader, seconds=10e-3))
    step = plan_at(needy, 8).stages["distill"]
    assert step.bound == "loader"
    assert step.clips_per_second == pytest.approx(100) and step.cores == pytest.approx(1.0)
    assert step.disk == pytest.approx(100 * job.loader.bytes)
    alone = plan_at(replace(needy, on_gpu=False), 8).stages["distill"]
    assert alone.seconds == pytest.approx(alone.compute + alone.exposed + alone.loader)
    assert alone.loader == pytest.approx(256 * 10e-3 * ASSUMED.sharing)
    seen = plan_at(replace(needy, on_gpu=False, beside=5e-3), 8).stages["distill"]
    assert seen.loader == pytest.approx(256 * 5e-3)


def test_more_gpus_never_take_longer(audioset):
    """While the batch grows with them; and memory never grows."""
    tree = {**TREE, "train_micro_batch_size_per_gpu": 8}
    del tree["train_batch_size"]
    plans = [plan_at(make_job(audioset, tree=tree), gpus) for gpus in (1, 8, 64, 512, 4096)]
    hours = [one.hours for one in plans]
    assert hours == sorted(hours, reverse=True) and hours[0] / hours[-1] > 2000
    for stage in (1, 2, 3):
        totals = [one.memory[stage].total for one in plans]
        assert totals == sorted(totals, reverse=True)
    assert all(one.memory[0] is None for one in plans)  # refused in 16 bits
    assert plan_at(make_job(audioset, tree={"train_batch_size": 8}), 8).memory[0] is not None


def test_micro_batches_of_a_step_wait_in_memory(audioset):
    job = make_job(audioset)
    whole, cut = (replace(job, tree={**TREE, "train_batch_size": 64, "gradient_accumulation_steps": n}) for n in (1, 4))
    more = (
        plan_at(cut, 8).memory[1].batches
        - plan_at(replace(whole, tree={**TREE, "train_batch_size": 16}), 8).memory[1].batches
    )
    assert more == 6 * job.work["ssl"].batch + 8 * 512 * 768 * 2  # three of 2 clips, and the raw features of all 8


def test_more_memory_takes_larger_batches(audioset):
    largest = [plan_at(make_job(audioset, gpu), 8).largest_micro for gpu in ("A100-40", "A100-80", "H200")]
    assert 0 < largest[0] < largest[1] < largest[2]
    job = make_job(audioset, "A100-40")
    for micro, fits in ((largest[0], True), (largest[0] + 1, False)):
        tree = {**TREE, "train_batch_size": 8 * micro}
        assert (plan_at(replace(job, tree=tree), 8).memory[1].total <= job.gpu.memory) is fits


def test_the_files_of_the_repository_can_be_planned(audioset):
    for file in sorted(LAUNCH.glob("ds_config*.json")):
        tree = ds_config.load(file)
        gpu = plan_job.choose_gpu(None, ds_config.precision(tree))
        for gpus in plan_job.GPU_COUNTS:
            one = plan_at(plan_job.job(audioset, tree, Clips(2_000_000, 2_000_000, 527), gpu), gpus)
            assert one.hours > 0 and one.sizes.micro * one.sizes.accumulation * gpus == one.sizes.total
    assert zero_of(ds_config.load(LAUNCH / "ds_config_zero3.json")).overlap
    assert not zero_of(TREE).overlap and zero_of(TREE, 3).overlap  # DeepSpeed's defaults


def test_the_papers_point(audioset):
    paper = plan_report.paper_point(audioset)
    assert paper.epochs == {"ssl": 32, "distill": 10}
    v100 = 32 * 0.35 * 125e12
    assert paper.clips_per_second["ssl"] == pytest.approx(v100 / (7.25 * 96.6e9), rel=0.1)
    assert paper.clips_per_second["distill"] == pytest.approx(v100 / (4 * 96.6e9), rel=0.1)  # with its teacher
    hours = sum(2e6 * paper.epochs[kind] / paper.clips_per_second[kind] / 3600 for kind in paper.epochs)
    assert paper.hours == pytest.approx(hours, rel=0.001)
    nano = replace(audioset, model=replace(audioset.model, size="nano"), data=replace(audioset.data, seconds=1.0))
    assert plan_report.paper_point(nano) == paper


def test_parameters_of_a_stage(audioset):
    ssl = plan_cost.parameters(audioset, "ssl", 527, ())
    labelled = plan_cost.parameters(audioset, "distill", 527, ("nano",))
    assert ssl.model == 92_166_415 and ssl.model - ssl.trained == 406_799  # the README's breakdown
    joined = 768 * SIZES["nano"].embed_dim + SIZES["nano"].embed_dim
    assert labelled.trained == 92_166_415 - 3_554_560 - 2_558_464 + joined
    assert 0 < labelled.teacher < 1_000_000 and ssl.teacher == 0
    assert ssl.averaged == labelled.averaged == 0


def test_parameters_of_a_linear_probe_and_a_moving_average(audioset):
    probe = replace(audioset, distill=replace(audioset.distill, frozen=True))
    assert plan_cost.parameters(probe, "distill", 527, ()).trained == 406_799
    assert plan_cost.parameters(probe, "ssl", 527, ()) == plan_cost.parameters(audioset, "ssl", 527, ())
    attentive = replace(probe, model=replace(probe.model, pooling="attentive"))
    assert plan_cost.parameters(attentive, "distill", 527, ()).trained == 406_799 + 3 * 768**2 + 4 * 768
    averaged = replace(audioset, distill=replace(audioset.distill, ema=0.999))
    found = plan_cost.parameters(averaged, "distill", 527, ("nano",))
    assert found.averaged == found.trained > 0
    assert plan_cost.parameters(averaged, "ssl", 527, ()).averaged == 0


def test_loader_costs(tmp_path):
    gpu, cpu = (plan_loader.costs(on_gpu, 10.0, tmp_path / "none.json") for on_gpu in (True, False))
    assert all(cpu[name].seconds > gpu[name].seconds for name in plan_loader.SOURCES)
    half = plan_loader.costs(False, 5.0, tmp_path / "none.json")
    assert half["packed"].seconds == pytest.approx(cpu["packed"].seconds / 2)
    assert cpu["flac"].seconds / 2 < half["flac"].seconds < cpu["flac"].seconds  # the whole file is decoded
    file = tmp_path / "throughput.json"
    rows = [
        {"candidate": "ours", "source": name, "workers": 2, "cpu_s_per_1000": value}
        for name, value in (("packed", 0.7), ("flac", 2.0), ("ogg", 7.0))
    ]
    about = {"data": {"flac_bytes": 2e5, "ogg_bytes": 1e5}, "machine": {"cpu": "C", "date": "D"}, "rows": rows}
    file.write_text(json.dumps(about))
    found = plan_loader.costs(False, 10.0, file)
    assert (
        found["flac"].seconds == pytest.approx(2e-3) and found["flac"].bytes == 2e5 and "(C, D)" in found["ogg"].origin
    )
    decoding = {"candidate": "decode_ours", "source": "flac", "workers": 2, "cpu_s_per_1000": 1.1}
    file.write_text(json.dumps({**about, "rows": [*rows, decoding]}))
    decoded = plan_loader.costs(True, 10.0, file)
    assert decoded["flac"].seconds == pytest.approx(1.1e-3) and decoded["packed"].seconds == pytest.approx(0.1e-3)
    file.write_text(json.dumps({**about, "rows": rows[:1]}))
    part = plan_loader.costs(False, 10.0, file)
    assert part["packed"] == found["packed"] and part["flac"] == cpu["flac"]
    file.write_text(json.dumps({"rows": rows}))
    with pytest.raises(InputError, match="throughput"):
        plan_loader.costs(False, 10.0, file)


def test_a_manifests_kind_of_file_and_its_bytes(tones):
    known = plan_loader.costs(True, 10.0)
    table = manifest.load(tones)
    assert plan_loader.cost_of(table, known) == known["packed"]  # of a WAV a crop costs the crop


QUICK = ["plan", "--config", LAUNCH / "configs" / "quickstart.toml", "--ds_config", LAUNCH / "ds_config_a100.json"]


def run(capsys, *arguments):
    assert cli.main([str(argument) for argument in (*QUICK, *arguments)]) == 0
    return capsys.readouterr()


def test_the_command(capsys, tones):
    plain = run(capsys)
    assert plain.err == "" and "Taken for granted:" in plain.out and "about 28 h an iteration" in plain.out
    assert [line.split()[0] for line in plain.out.split("ZeRO stage:")[1].splitlines()[2:7]] == [
        "1",
        "8",
        "64",
        "512",
        "4096",
    ]
    both = run(capsys, "--json", "--gpu", "H100", "--gpus", "4", "16", "--manifest", tones, "--epochs", "7")
    found = json.loads(both.out)
    assert [one["gpus"] for one in found["plans"]] == [4, 16] and found["gpu"]["name"] == "H100"
    assert found["stages"]["ssl"]["clips"] == 32 and found["stages"]["ssl"]["epochs"] == 7  # a fifth is held out
    assert found["plans"][0]["memory"]["1"]["total"] > 0 and found["plans"][0]["memory"]["0"] is None
    assert len(found["assumptions"]) > 8 and all(line in both.err for line in found["assumptions"])
    assert "no batch" in run(capsys, "--gpus", "4096", "--clips", "1000").out
    shorter = run(capsys, "--json", "--clips", "1000", "--set", "data.max_train=10")
    assert [json.loads(shorter.out)["stages"][kind]["clips"] for kind in ("ssl", "distill")] == [1000, 10]


def test_what_does_not_fit_is_marked(capsys):
    base = ("--set", "model.size=base", "--set", "data.seconds=10.0", "--gpus", "1")
    assert "! does not fit" in run(capsys, *base, "--gpu", "A100-40").out
    assert "! does not fit" not in run(capsys, "--gpus", "1").out


def test_wrong_arguments_are_one_line(capsys, tmp_path, tones):
    assert "A100-80" in fails(capsys, [*QUICK, "--gpu", "A1000"], code=2)
    assert "no bf16" in fails(capsys, [*QUICK, "--gpu", "V100-32"], code=2)
    assert "choose one" in fails(capsys, [*QUICK, "--clips", "10", "--manifest", tones], code=2)
    fails(capsys, [*QUICK, "--gpu", "this", "--measured", tmp_path / "x"], code=2)
    fails(capsys, [*QUICK, "--manifest", tmp_path / "none"])
    fails(capsys, [*QUICK[:3], "--ds_config", tmp_path / "none"])
    fails(capsys, ["plan", "--config", tmp_path / "none", *QUICK[3:]])
    fails(capsys, [*QUICK, "--set", "model.size=huge"], code=2)
    strange = json.dumps({**MEASURED, "beside": "x"})
    for text in (strange, "", "[]", "{}", '{"stages": {}}', '{"stages": {"ssl": {"clip": "x"}}}', '{"measured": 3}'):
        file = tmp_path / "measured.json"
        file.write_text(text)
        assert "--gpu this --json" in fails(capsys, [*QUICK, "--measured", file])
    fails(capsys, [*QUICK, "--measured", tmp_path / "none"])


MEASURED = {
    "device": "AMD EPYC, 2 cores",
    "on_gpu": False,
    "cores": 2,
    "memory": 16e9,
    "size": "nano",
    "seconds": 5.0,
    "precision": "bf16",
    "base": 1e9,
    "loader_seconds": 3e-3,
    "beside": None,
    "spread": 0.5,
    "stages": {kind: {"clip": 0.01, "micro_batch": 0.02, "step": 0.04} for kind in ("ssl", "distill", "teacher")},
}


def test_measured_costs_are_those_of_the_plan(capsys, tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"measured": MEASURED}))
    four = tmp_path / "four.json"
    four.write_text(json.dumps({**TREE, "train_batch_size": 32, "gradient_accumulation_steps": 4}))
    found = json.loads(run(capsys, "--json", "--measured", file, "--gpus", "1", "--ds_config", four).out)
    step = found["plans"][0]["stages"]["ssl"]
    assert step["compute"] == pytest.approx(4 * (8 * 0.01 + 0.02) + 0.04)
    assert step["seconds"] == pytest.approx(step["compute"] + 32 * 3e-3 / 2 * ASSUMED.sharing)
    assert found["plans"][0]["memory"]["1"]["total"] > 1e9 and found["measured"]["cores"] == 2
    assert "within 50%; it was busy" in " ".join(found["assumptions"])
    card = json.loads(run(capsys, "--json", "--measured", file, "--gpu", "H200", "--gpus", "1").out)
    assert card["gpu"]["memory"] == 141e9  # measured costs on a card's memory and links
    assert "seconds" in fails(capsys, [*QUICK, "--measured", file, "--set", "data.seconds=10"], code=2)
    file.write_text(json.dumps({**MEASURED, "stages": {"ssl": MEASURED["stages"]["ssl"]}}))
    assert "distill" in fails(capsys, [*QUICK, "--measured", file])


@pytest.mark.parametrize("multi_label", [False, True])
def test_this_machine_is_measured(training, tones, tmp_path, multi_label):
    """In a process of its own: the costs it prints are those it plans with."""
    if multi_label:
        table = manifest.load(tones)
        rows = [f"{table.path(i)},{('low', 'high', 'low;high')[i % 3]}" for i in range(len(table))]
        tones = tmp_path / "both.csv"
        tones.write_text("\n".join(["path,label", *rows]))
    tree = tmp_path / "ds.json"
    tree.write_text(json.dumps({"train_batch_size": 16, "zero_optimization": {"stage": 1}}))
    short = ["--set", "data.seconds=0.96", "--set", "distill.teacher=previous", "--set", "recipe.iterations=2"]
    arguments = [*QUICK[:3], "--ds_config", tree, *short, "--gpu", "this", "--json", "--manifest", tones]
    training.call("plan_ranks.save_plan", tmp_path / "plan.json", *arguments)
    found = json.loads((tmp_path / "plan.json").read_text())
    (one,), measured = found["plans"], found["measured"]
    for kind in ("ssl", "distill"):
        cost = measured["stages"][kind]
        assert cost["clip"] > 0 and cost["step"] > 0
        passes = 16 * cost["clip"] + cost["micro_batch"] + cost["step"]
        assert one["stages"][kind]["compute"] == pytest.approx(passes)
    assert 0 < measured["loader_seconds"] < 1 and 0 <= measured["beside"] < 1 and measured["base"] > 1e8
