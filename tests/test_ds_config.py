"""The DeepSpeed JSON: one owner for each quantity, and no combination that trains silently wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsskd import ds_config
from fastsskd.errors import InputError, UsageError

LAUNCH = Path(__file__).parents[1] / "launch"


def write(tmp_path, tree) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def refusal(tmp_path, tree) -> str:
    """The one line with which a JSON file is refused."""
    path = write(tmp_path, tree)
    with pytest.raises(UsageError) as caught:
        ds_config.load(path)
    text = str(caught.value)
    assert text.startswith(f"ds_config {path}: ") and "\n" not in text
    return text


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("ds_config*.json")), ids=lambda path: path.name)
def test_every_file_we_ship_is_accepted(path, tmp_path):
    tree = ds_config.load(path)
    for world_size in (1, 2):
        ds_config.resolve(tree, world_size, tmp_path)
    if ds_config.precision(tree) == "fp32" or "bf16" in tree:
        ds_config.check_device(tree, "cpu")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("key", "owner"), [("optimizer", "[optim]"), ("scheduler", "optim.schedule"), ("seed", "run.seed")]
)
def test_what_the_toml_owns_is_refused_naming_both(tmp_path, key, owner):
    text = refusal(tmp_path, {"train_batch_size": 8, key: {}})
    assert f"'{key}' belongs to the TOML" in text and owner in text and "remove it here" in text


def test_an_unknown_key_is_refused(tmp_path):
    assert "unknown key 'train_batchsize'" in refusal(tmp_path, {"train_batchsize": 8})


def test_two_precisions_are_refused(tmp_path):
    both = {"fp16": {"enabled": True}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    assert "fp16 and bf16 are both enabled; choose one" in refusal(tmp_path, both)
    one = {**both, "fp16": {"enabled": False}}
    assert ds_config.precision(ds_config.load(write(tmp_path, one))) == "bf16"


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {"stage": 0}}, {"zero_optimization": {}}])
def test_16_bit_with_stage_0_is_refused(tmp_path, name, zero):
    text = refusal(tmp_path, {name: {"enabled": True}, **zero})
    assert f"{name} with ZeRO stage 0 trains silently wrong" in text and '"stage": 1' in text


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_16_bit_with_other_stages_and_full_precision_with_any_pass(tmp_path, stage):
    tree = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    assert ds_config.zero_stage(ds_config.load(write(tmp_path, tree))) == stage
    assert ds_config.precision(ds_config.load(write(tmp_path, {}))) == "fp32"
    assert ds_config.zero_stage(ds_config.load(write(tmp_path, {}))) == 0


@pytest.mark.parametrize("stage", [4, -1, "two", 1.5, True, None, [1]])
def test_a_stage_that_does_not_exist_is_refused(tmp_path, stage):
    assert "zero_optimization.stage must be 0, 1, 2 or 3" in refusal(tmp_path, {"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("key", ["fp16", "bf16", "zero_optimization", "tensorboard"])
def test_a_section_that_is_no_object_is_refused(tmp_path, key):
    assert f"'{key}' must be an object" in refusal(tmp_path, {key: True})


@pytest.mark.parametrize("value", ["x", -1.0, None, True, float("nan")])
def test_clipping_is_a_number_from_zero_on(tmp_path, value):
    assert "gradient_clipping must be a number" in refusal(tmp_path, {"gradient_clipping": value})
    ds_config.load(write(tmp_path, {"gradient_clipping": 1}))


@pytest.mark.parametrize("key", ["fp16", "bf16"])
@pytest.mark.parametrize("value", ["false", 1, None])
def test_a_precision_is_on_or_off(tmp_path, key, value):
    """DeepSpeed reads the word "false" as off, where a check of our own would take it for on."""
    assert f"{key}.enabled must be true or false" in refusal(tmp_path, {key: {"enabled": value}})


@pytest.mark.parametrize(
    ("section", "key", "value", "why"),
    [
        ("bf16", "check_grad_overflow", False, "one NaN would spoil the weights"),
        ("zero_optimization", "compute_grad_norm", False, "one NaN would spoil the weights"),
        ("zero_optimization", "round_robin_gradients", True, "mixes up the float32 weights"),
        ("bf16", "bf16_master_weights_and_grads", True, "checkpoints hold float32 master weights"),
        ("fp16", "fp16_master_weights_and_grads", True, "checkpoints hold float32 master weights"),
    ],
)
def test_settings_that_break_a_promise_are_refused(tmp_path, section, key, value, why):
    text = refusal(tmp_path, {section: {key: value}})
    assert f"{section}.{key} = {json.dumps(value)}: " in text and why in text and "remove it" in text
    ds_config.load(write(tmp_path, {section: {key: not value}}))


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_offloading_is_refused(tmp_path, key):
    text = refusal(tmp_path, {"zero_optimization": {"stage": 3, key: {"device": "cpu"}}})
    assert f"zero_optimization.{key} is not supported" in text
    for nowhere in (None, {}, {"device": "none"}):
        ds_config.load(write(tmp_path, {"zero_optimization": {"stage": 3, key: nowhere}}))


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "[1", "\x00"])
def test_a_file_that_is_no_json_is_refused(tmp_path, text):
    assert "not valid JSON" in refusal(tmp_path, text)


@pytest.mark.parametrize("tree", ["[]", "3", '"text"', "null"])
def test_json_that_is_no_object_is_refused(tmp_path, tree):
    assert "expected an object" in refusal(tmp_path, tree)


def test_an_absent_file_is_bad_input(tmp_path):
    present = write(tmp_path, "{}")
    for path in (tmp_path / "none.json", tmp_path, present / "below-a-file.json"):
        with pytest.raises(InputError) as caught:
            ds_config.load(path)
        assert type(caught.value) is InputError and str(path) in str(caught.value)
        assert "launch/ds_config" in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- device


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match=r'fp16 needs a GPU; on a CPU use "bf16"'):
        ds_config.check_device({"fp16": {"enabled": True}}, "cpu")
    ds_config.check_device({"bf16": {"enabled": True}}, "cpu")
    ds_config.check_device({}, "cpu")


def pretend_gpu(monkeypatch, capability, built_for):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)


def test_a_v100_needs_its_own_build_and_fp16(monkeypatch):
    pretend_gpu(monkeypatch, (7, 0), ["sm_75", "sm_80", "sm_90"])
    with pytest.raises(UsageError, match=r"no code for Some GPU \(sm_70\); install the cu126 build"):
        ds_config.check_device({"fp16": {"enabled": True}}, "cuda")
    pretend_gpu(monkeypatch, (7, 0), ["sm_70", "sm_75"])
    ds_config.check_device({"fp16": {"enabled": True}}, "cuda")
    with pytest.raises(UsageError, match=r"Some GPU \(sm_70\) has no bf16; use launch/ds_config_v100.json"):
        ds_config.check_device({"bf16": {"enabled": True}}, "cuda")


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((9, 0), ["sm_75", "sm_80", "sm_90"]),
        ((8, 9), ["sm_75", "sm_80", "sm_90"]),  # code for an earlier card of the same generation
        ((12, 1), ["sm_90", "sm_120"]),
        ((10, 3), ["sm_90", "compute_90"]),  # code that the driver translates
    ],
)
def test_newer_gpus_take_bf16(monkeypatch, capability, built_for):
    pretend_gpu(monkeypatch, capability, built_for)
    ds_config.check_device({"bf16": {"enabled": True}}, "cuda")


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((10, 0), ["sm_75", "sm_80", "sm_90", "sm_90a"]),
        ((8, 0), ["sm_75", "sm_86"]),
        ((9, 0), ["compute_100", "sm_100"]),
    ],
)
def test_a_build_without_the_card_s_code_names_the_right_one(monkeypatch, capability, built_for):
    pretend_gpu(monkeypatch, capability, built_for)
    with pytest.raises(
        UsageError, match=r"no code for Some GPU \(sm_.*install the newest build of torch 2.11"
    ) as caught:
        ds_config.check_device({}, "cuda")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- batch sizes

TOTAL, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@given(
    micro=st.integers(1, 64),
    accumulation=st.integers(1, 8),
    world=st.integers(1, 16),
    given_keys=st.sampled_from(
        [{TOTAL, MICRO}, {TOTAL, ACCUMULATION}, {MICRO, ACCUMULATION}, {TOTAL, MICRO, ACCUMULATION}]
    ),
)
def test_any_two_sizes_give_the_third(micro, accumulation, world, given_keys):
    everything = {TOTAL: micro * accumulation * world, MICRO: micro, ACCUMULATION: accumulation}
    sizes = ds_config.batch_sizes({key: everything[key] for key in given_keys}, world)
    assert sizes == ds_config.BatchSizes(everything[TOTAL], micro, accumulation)


def test_one_size_alone_means_no_accumulation():
    assert ds_config.batch_sizes({TOTAL: 32}, 4) == ds_config.BatchSizes(32, 8, 1)
    assert ds_config.batch_sizes({MICRO: 8}, 4) == ds_config.BatchSizes(32, 8, 1)
    assert ds_config.batch_sizes({TOTAL: 32, MICRO: "auto"}, 4) == ds_config.BatchSizes(32, 8, 1)


@pytest.mark.parametrize(
    ("tree", "world"),
    [
        ({TOTAL: 32, MICRO: 8, ACCUMULATION: 2}, 1),
        ({TOTAL: 32}, 3),
        ({TOTAL: 2}, 4),
        ({TOTAL: 32, MICRO: 5}, 1),
        ({TOTAL: 8, MICRO: 16}, 1),
        ({TOTAL: 32, ACCUMULATION: 5}, 2),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(tree, world):
    with pytest.raises(UsageError) as caught:
        ds_config.batch_sizes(tree, world)
    text = str(caught.value)
    assert f"train_batch_size {tree[TOTAL]} is not" in text and f"{world} rank(s); change one of them" in text
    assert "\n" not in text


def test_no_size_at_all_is_refused():
    with pytest.raises(UsageError, match="set train_batch_size or train_micro_batch_size_per_gpu"):
        ds_config.batch_sizes({ACCUMULATION: 2}, 1)


@pytest.mark.parametrize("key", [TOTAL, MICRO, ACCUMULATION])
@pytest.mark.parametrize("value", [0, -4, 2.0, "8", True, [8]])
def test_a_size_is_a_positive_integer(key, value):
    with pytest.raises(UsageError, match=f"{key} must be a positive integer"):
        ds_config.batch_sizes({TOTAL: 32, key: value}, 1)


# ----------------------------------------------------------------------------------------------------------- resolved


def test_the_resolved_file_names_all_three_sizes_and_keeps_the_rest(tmp_path):
    tree = {TOTAL: 32, ACCUMULATION: 2, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
    before = json.dumps(tree)
    resolved = ds_config.resolve(tree, 2, tmp_path)
    assert (resolved[TOTAL], resolved[MICRO], resolved[ACCUMULATION]) == (32, 8, 2)
    assert resolved["gradient_clipping"] == 1.0 and resolved["zero_optimization"] == {"stage": 1}
    assert json.dumps(tree) == before
    json.dumps(resolved)


def test_zero_3_leaves_the_teacher_s_linear_layers_alone_unless_told(tmp_path):
    stage3 = {TOTAL: 8, "zero_optimization": {"stage": 3}}
    assert ds_config.resolve(stage3, 1, tmp_path)["zero_optimization"]["memory_efficient_linear"] is False
    told = {TOTAL: 8, "zero_optimization": {"stage": 3, "memory_efficient_linear": True}}
    assert ds_config.resolve(told, 1, tmp_path)["zero_optimization"]["memory_efficient_linear"] is True


def test_tensorboard_writes_into_the_run_s_folder_unless_told(tmp_path):
    resolved = ds_config.resolve({TOTAL: 8, "tensorboard": {"enabled": True}}, 1, tmp_path / "tb")
    assert resolved["tensorboard"]["output_path"] == str(tmp_path / "tb")
    told = {TOTAL: 8, "tensorboard": {"enabled": True, "output_path": "elsewhere"}}
    assert ds_config.resolve(told, 1, tmp_path)["tensorboard"]["output_path"] == "elsewhere"
    assert "tensorboard" not in ds_config.resolve({TOTAL: 8}, 1, tmp_path)


def test_deepspeeds_own_refusals_are_one_line(tmp_path):
    pytest.importorskip("deepspeed")
    tree = {"train_batch_size": 8, "zero_optimization": {"stage": 1, "stag": 1}}
    with pytest.raises(UsageError) as error:
        ds_config.resolve(tree, 1, tmp_path)
    assert "stag" in str(error.value) and "\n" not in str(error.value)
    ds_config.resolve({"train_batch_size": 8, "zero_optimization": {"stage": 1}}, 2, tmp_path)
