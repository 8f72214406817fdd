"""Starting weights from a model of ours, whatever its clip length, classes and attention; and what else is named."""

import dataclasses

import pytest
import torch
from vit_files import accounted

from fastsskd.errors import InputError
from fastsskd.model import build_model
from fastsskd.starting.imagenet import resize_positions
from fastsskd.starting.initialise import initialise, starting_weights
from fastsskd.weights import ModelInfo, save_model

CLASSES = ("bell", "cat", "dog", "räin")
INFO = ModelInfo("nano", CLASSES, False, 0.96, -4.0, 4.5)
HEAD = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}


@pytest.fixture
def saved(tmp_path, make_model):
    """A model and its file."""
    model = make_model(seed=3)
    path = tmp_path / "run" / "model.safetensors"
    save_model(path, model.state_dict(), INFO)
    return model, path


def refusal(model, path) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        initialise(model, path, CLASSES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and caught.value.exit_code == 1
    return text


# ------------------------------------------------------------------------------------------------------ what is taken


@pytest.mark.parametrize("as_folder", [False, True])
def test_the_same_shape_takes_everything(saved, make_model, as_folder):
    source, path = saved
    model = make_model(seed=9)
    report = initialise(model, path.parent if as_folder else path, CLASSES)
    assert sorted(report.names("loaded")) == sorted(source.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())
    assert len(report.lines()) == 1 and "size nano, 0.96 s, 4 classes: 58 loaded" in report.lines()[0]


@pytest.mark.parametrize("classes", [("a", "b", "c", "d"), None])
def test_other_classes_leave_the_head_fresh_and_say_so(saved, make_model, classes):
    """By their names where these are known, else by their number."""
    source, path = saved
    number = 7 if classes is None else 4
    model, fresh = make_model(num_classes=number, seed=9), make_model(num_classes=number, seed=9)
    report = initialise(model, path, classes)
    accounted(report, model, source.state_dict())
    assert set(report.names("ignored")) == set(report.names("missing")) == (HEAD if classes else {*sorted(HEAD)[2:]})
    for name in report.names("missing"):
        assert torch.equal(model.state_dict()[name], fresh.state_dict()[name])
    assert torch.equal(model.patch_embed.weight, source.patch_embed.weight)
    assert "for other classes" in report.table()


def test_a_file_without_a_head_and_a_model_without_one(tmp_path, saved, make_model):
    source, path = saved
    headless = make_model(num_classes=0)
    report = initialise(headless, path)
    assert set(report.names("ignored")) == HEAD and "no head here" in report.table()
    accounted(report, headless, source.state_dict())
    save_model(tmp_path / "h.safetensors", headless.state_dict(), dataclasses.replace(INFO, classes=()))
    model = make_model()
    report = initialise(model, tmp_path / "h.safetensors", CLASSES)
    assert set(report.names("missing")) == HEAD
    accounted(report, model, headless.state_dict())


@pytest.mark.parametrize(("before", "after"), [(10.0, 5.0), (5.0, 10.0)])
def test_positions_are_resized_to_another_clip_length(tmp_path, before, after):
    source, model = (build_model("nano", 4, seconds=seconds, seed=seed) for seconds, seed in ((before, 1), (after, 2)))
    path = tmp_path / "m.safetensors"
    save_model(path, source.state_dict(), dataclasses.replace(INFO, seconds=before))
    report = initialise(model, path, CLASSES)
    assert report.names("resized") == ["pos_embed"] and report.names("missing") == report.names("ignored") == []
    accounted(report, model, source.state_dict())
    expected = resize_positions(source.pos_embed.detach(), source.grid_size, model.grid_size)
    assert torch.equal(model.pos_embed, expected)
    assert (
        "({} x 8 to {} x 8 (time, frequency), bicubic)".format(*((64, 32) if before == 10.0 else (32, 64)))
        in (report.lines()[2])
    )


def test_another_attention_takes_the_same_weights_and_says_so(saved, make_model):
    source, path = saved
    model = make_model(attention="simam", seed=9)
    report = initialise(model, path, CLASSES)
    assert "4 classes, plain attention:" in report.lines()[0]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())


def test_attentive_pooling_is_taken_along(tmp_path, make_model):
    """With its head where the classes are the same, and to other classes without it."""
    source, path = make_model(pooling="attentive", seed=3), tmp_path / "m.safetensors"
    save_model(path, source.state_dict(), dataclasses.replace(INFO, pooling="attentive"))
    for classes, ignored in ((CLASSES, set()), (("a", "b", "c", "d"), HEAD)):
        model = make_model(pooling="attentive", seed=9)
        report = initialise(model, path, classes)
        accounted(report, model, source.state_dict())
        assert set(report.names("ignored")) == set(report.names("missing")) == ignored
        assert torch.equal(model.pool.query, source.pool.query)


@pytest.mark.parametrize(("before", "after"), [("mean", "attentive"), ("attentive", "mean")])
def test_a_head_for_another_pooling_stays_behind(tmp_path, make_model, before, after):
    source, path = make_model(pooling=before, seed=3), tmp_path / "m.safetensors"
    save_model(path, source.state_dict(), dataclasses.replace(INFO, pooling=before))
    model, fresh = make_model(pooling=after, seed=9), make_model(pooling=after, seed=9).state_dict()
    report = initialise(model, path, CLASSES)
    accounted(report, model, source.state_dict())
    own = {name for name in model.state_dict() if name.startswith(("head.", "pool."))}
    assert set(report.names("missing")) == own and set(report.names("ignored")) >= HEAD
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in own)
    assert "for another pooling" in report.table()


def test_a_look_into_the_file_needs_no_model_in_memory(saved, make_model):
    _, path = saved
    with torch.device("meta"):
        model = make_model()
    take, report = starting_weights(model, path, CLASSES)
    assert take.keys() == model.state_dict().keys() == {*report.names("loaded")}
    assert not any(value.is_meta for value in take.values())


# --------------------------------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize("size", ["micro", "tiny"])
@pytest.mark.parametrize("seconds", [0.96, 2.0])
def test_another_size_says_what_it_is_and_what_would_fit(saved, make_model, size, seconds):
    _, path = saved
    text = refusal(make_model(size, seconds=seconds), path)
    assert f"a model of size 'nano' does not fit this one ({size}); set model.size = \"nano\"" in text


@pytest.mark.parametrize(("stored", "wanted"), [("micro", "tiny"), ("tiny", "micro")])
def test_another_depth_of_the_same_width_is_an_error(tmp_path, make_model, stored, wanted):
    save_model(tmp_path / "m.safetensors", make_model(stored).state_dict(), dataclasses.replace(INFO, size=stored))
    assert f"size {stored!r} does not fit" in refusal(make_model(wanted), tmp_path / "m.safetensors")


def test_a_file_that_is_not_what_it_says_is_an_error(tmp_path, make_model):
    path, state = tmp_path / "m.safetensors", make_model().state_dict()
    save_model(path, {name: value for name, value in state.items() if name != "norm.weight"}, INFO)
    assert "lacks norm.weight; the file is damaged" in refusal(make_model(), path)
    for name, value in (("norm.weight", torch.ones(3)), ("extra", torch.ones(3)), ("pos_embed", torch.ones(48, 64))):
        save_model(path, {**state, name: value}, INFO)
        assert f"{name} does not fit its own description; the file is damaged" in refusal(make_model(), path)


def test_imagenet_is_not_a_file_and_which_one_to_fetch_is_said(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        base, small = (make_model(size, seconds=10.0) for size in ("base", "small"))
    for model, name in ((base, "vit_base_patch16_224"), (small, "vit_small_patch16_224")):
        with pytest.raises(InputError) as caught:
            starting_weights(model, "imagenet")
        text = str(caught.value)
        assert "\n" not in text and f"fetch model.safetensors of timm/{name}." in text
        assert f"documented at huggingface.co/timm/{name}." in text
    assert "no published ViT is like this model: set model.size to base, small, tiny" in refusal(
        make_model(), "imagenet"
    )
    save_model(tmp_path / "imagenet" / "model.safetensors", make_model().state_dict(), INFO)
    assert initialise(make_model(), "imagenet", CLASSES).names("missing") == []  # unless there is one of that name


def test_what_lies_around_a_model_in_a_run_is_named(saved, make_model, tmp_path):
    (tmp_path / "run/checkpoints/step-0004").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-0004/manifest.json").write_text("{}")
    assert "a run; its models are in checkpoints/<stage>/" in refusal(make_model(), tmp_path / "run")
    assert "it is for --resume; start from the model.safetensors" in refusal(
        make_model(), tmp_path / "run/checkpoints/step-0004"
    )
    assert "no such file or folder" in refusal(make_model(), tmp_path / "none")
    torch.save(make_model().state_dict(), tmp_path / "bare.pth")
    assert "a model of fastsskd, perhaps without the description" in refusal(make_model(), tmp_path / "bare.pth")
