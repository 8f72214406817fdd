"""Labels and distillation against Formulas 11-13 computed apart; and who gets a gradient."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fastsskd.augment import mix_fbank, mixup_partner
from fastsskd.batch import Batch
from fastsskd.class_map import load_class_map
from fastsskd.config import AugmentConfig, DataConfig, DistillConfig
from fastsskd.distill import Distill
from fastsskd.errors import InputError, UsageError
from fastsskd.teachers.ours import OwnTeacher
from fastsskd.weights import ModelInfo

CLASSES = ("bell", "cat", "dog", "rain")
FRAMES = 94


class FixedTeacher:
    """Scores and features that are a fixed linear function of the waveform."""

    def __init__(self, embed_dim=64, classes=CLASSES, score_kind="logits"):
        self.classes, self.score_kind, self.embed_dim = classes, score_kind, embed_dim
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(15360, len(classes) + embed_dim, generator=generator).requires_grad_()
        self.heard = []

    def __call__(self, waveform):
        self.heard.append(waveform)
        out = waveform @ self.weight
        scores, features = out[:, : len(self.classes)], out[:, len(self.classes) :]
        return (scores if self.score_kind == "logits" else scores.sigmoid()), features


def make_distill(
    model, *, teacher=None, multi_label=False, classes=CLASSES, augmentation=None, class_map=None, **distill
) -> Distill:
    return Distill(
        model.eval(),
        classes=classes,
        multi_label=multi_label,
        distill=DistillConfig(**distill),
        augmentation=augmentation or AugmentConfig(),
        data=DataConfig(),
        num_frames=FRAMES,
        teacher=teacher,
        class_map=class_map,
    )


def empty(batch: Batch) -> Batch:
    """The batch when all its clips were bad."""
    columns = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: None if value is None else value[:0] for name, value in columns.items()})


def naive_ce(logits, target, multi_label: bool) -> float:
    """Cross entropy, or the mean over classes of binary cross entropies, clip by clip in plain numbers."""
    total = 0.0
    for row, goal in zip(logits.tolist(), target.tolist(), strict=True):
        if multi_label:
            probs = [1 / (1 + math.exp(-z)) for z in row]
            logs = [t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in zip(probs, goal, strict=True)]
            total -= sum(logs) / len(row)
        else:
            denominator = sum(math.exp(z) for z in row)
            total -= sum(t * math.log(math.exp(z) / denominator) for z, t in zip(row, goal, strict=True))
    return total / len(logits)


def one_hot(batch) -> torch.Tensor:
    return torch.tensor([[float(c == label) for c in range(4)] for label in batch.label.tolist()])


def used_model(make_model, **options):
    model = make_model(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_without_a_teacher_it_is_supervised_training(make_model, make_batch, multi_label, smoothing):
    batch, model = make_batch(multi_label=multi_label), used_model(make_model)
    total, metrics = make_distill(model, multi_label=multi_label, label_smoothing=smoothing)(batch)
    target = batch.label if multi_label else one_hot(batch)
    floor = 0.5 if multi_label else 0.25
    expected = naive_ce(model(batch.fbank)[0], (1 - smoothing) * target + smoothing * floor, multi_label)
    assert set(metrics) == {"label"}
    assert total.item() == metrics["label"].item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ teacher


def teacher_probs(teacher, batch, multi_label: bool) -> torch.Tensor:
    scores = teacher(batch.waveform)[0].detach()
    if teacher.score_kind == "logits":
        return scores.sigmoid() if multi_label else scores.softmax(-1)
    return scores if multi_label else scores / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("score_kind", ["logits", "probs"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("teacher_labels", [True, False])
def test_the_loss_is_formula_13(make_model, make_batch, multi_label, score_kind, labels, teacher_labels):
    batch, model = make_batch(multi_label=multi_label, waveform=True), used_model(make_model)
    teacher = FixedTeacher(score_kind=score_kind)
    options = {"labels": labels, "teacher_labels": teacher_labels, "gamma": 0.37}
    total, metrics = make_distill(model, teacher=teacher, multi_label=multi_label, **options)(batch)

    logits, clip = model(batch.fbank)
    target = batch.label if multi_label else one_hot(batch)
    features = teacher(batch.waveform)[1].detach()
    expected = {"regression": sum((clip - features).flatten().square().tolist()) / features.numel()}
    if labels:
        expected["label"] = naive_ce(logits, target, multi_label)
    if teacher_labels:
        expected["teacher_label"] = naive_ce(logits, teacher_probs(teacher, batch, multi_label), multi_label)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-4)
    weights = {"label": 1.0, "teacher_label": 1.0, "regression": 0.37}
    assert total.item() == pytest.approx(sum(weights[name] * value for name, value in expected.items()), rel=1e-4)


def test_label_smoothing_is_of_the_label_term_alone(make_model, make_batch):
    batch, model = make_batch(waveform=True), used_model(make_model)
    metrics = [make_distill(model, teacher=FixedTeacher(), label_smoothing=s)(batch)[1] for s in (0.0, 0.3)]
    assert metrics[0]["label"] != metrics[1]["label"]
    assert metrics[0]["teacher_label"] == metrics[1]["teacher_label"]


def test_a_teacher_of_other_classes_gives_features_only(make_model, make_batch):
    module = make_distill(make_model(), teacher=FixedTeacher(classes=("a", "b")))
    assert not module.uses_scores
    assert set(module(make_batch(waveform=True))[1]) == {"label", "regression"}


@pytest.mark.parametrize("kind", ["logits", "probs"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_teachers_classes_are_found_by_name(make_model, make_batch, kind, multi_label):
    """In another order, among others, one under another name: the scores are those of the columns picked by hand."""
    batch, model = make_batch(waveform=True, multi_label=multi_label), used_model(make_model)
    teacher = FixedTeacher(classes=("rain", "siren", "dog", "feline", "bell"), score_kind=kind)
    module = make_distill(model, teacher=teacher, multi_label=multi_label, class_map={"cat": "feline"})
    scores = teacher(batch.waveform)[0][:, [4, 3, 2, 0]]
    if kind == "logits":
        probs = scores.sigmoid() if multi_label else scores.softmax(1)
    else:
        probs = scores if multi_label else scores / scores.sum(1, keepdim=True)
    expected = naive_ce(module.model(batch.fbank)[0], probs, multi_label)
    assert module(batch)[1]["teacher_label"].item() == pytest.approx(expected, rel=1e-4)


def test_a_class_map_with_unknown_names_is_refused(make_model):
    for names, says in (
        ({"cow": "dog"}, "data set has no class 'cow'"),
        ({"cat": "lion"}, "teacher has no class 'lion'"),
    ):
        with pytest.raises(InputError, match=says):
            make_distill(make_model(), teacher=FixedTeacher(), class_map=names)


def test_class_map_files(tmp_path):
    assert load_class_map("") == {}
    (tmp_path / "map.json").write_text('{"cat": "feline"}')
    assert load_class_map(tmp_path / "map.json") == {"cat": "feline"}
    for text in ("[1]", '{"cat": 1}', "{"):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(InputError, match="class_map"):
            load_class_map(tmp_path / "map.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_class_map(tmp_path / "none.json")


def test_gamma_zero_switches_the_regression_off(make_model, make_batch):
    module = make_distill(make_model(), teacher=FixedTeacher(), gamma=0.0)
    assert set(module(make_batch(waveform=True))[1]) == {"label", "teacher_label"}


def test_a_linear_map_joins_features_of_other_widths(make_model, make_batch):
    batch, teacher = make_batch(waveform=True), FixedTeacher(embed_dim=10)
    module = make_distill(used_model(make_model), teacher=teacher)
    total, metrics = module(batch)
    clip, layer = module.model(batch.fbank)[1], module.projection
    mapped = clip @ layer.weight.T + layer.bias
    expected = ((mapped - teacher(batch.waveform)[1]) ** 2).mean().item()
    assert metrics["regression"].item() == pytest.approx(expected, rel=1e-5)
    total.backward()
    assert (layer.weight.grad != 0).any() and layer.weight.shape == (10, 64)
    assert make_distill(make_model(), teacher=FixedTeacher()).projection is None


@pytest.mark.parametrize(
    ("teacher", "options"),
    [
        (None, {"labels": False}),
        (FixedTeacher(), {"labels": False, "teacher_labels": False, "gamma": 0.0}),
        (FixedTeacher(classes=("a", "b")), {"labels": False, "gamma": 0.0}),
    ],
)
def test_no_loss_left_is_refused_at_once(make_model, teacher, options):
    with pytest.raises(UsageError, match="leaves no loss"):
        make_distill(make_model(), teacher=teacher, **options)


# -------------------------------------------------------------------------------------------------------------- mixup


@pytest.mark.parametrize("multi_label", [False, True])
def test_mixup_mixes_clips_labels_and_the_teacher_s_answers_alike(make_model, make_batch, multi_label):
    config = AugmentConfig(mixup=0.55, mixup_alpha=2)
    batch, model, teacher = make_batch(multi_label=multi_label, waveform=True), used_model(make_model), FixedTeacher()
    _, metrics = make_distill(model, teacher=teacher, multi_label=multi_label, augmentation=config)(batch)
    assert torch.equal(teacher.heard[0], batch.waveform)  # the teacher hears the clips as they are

    partner, ratio = mixup_partner(batch.seed, config)
    assert 0 < (ratio < 1).sum() < 5
    fbank = mix_fbank(batch.fbank, partner, ratio, DataConfig().std)
    logits, clip = model(fbank)

    def mix(rows):
        mixed = [ratio[b] * rows[b] + (1 - ratio[b]) * rows[int(partner[b])] for b in range(5)]
        return torch.stack(mixed).detach()

    target = mix(batch.label if multi_label else one_hot(batch))
    probs, features = mix(teacher_probs(teacher, batch, multi_label)), mix(teacher(batch.waveform)[1])
    expected = {
        "label": naive_ce(logits, target, multi_label),
        "teacher_label": naive_ce(logits, probs, multi_label),
        "regression": ((clip - features) ** 2).mean().item(),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-4)


def test_one_clip_has_nobody_to_be_mixed_with(make_model, make_batch):
    batch, model = make_batch([1]), make_model()
    plain = make_distill(model)(batch)[0]
    assert make_distill(model, augmentation=AugmentConfig(mixup=1.0))(batch)[0].item() == plain.item()


def test_the_student_hears_the_augmented_clip(make_model, make_batch):
    batch, model = make_batch(), make_model()
    augmentation = AugmentConfig(noise=1.0, time_roll=True)
    assert make_distill(model, augmentation=augmentation)(batch)[0] != make_distill(model)(batch)[0]


# ---------------------------------------------------------------------------------------------------------- gradients


def own_teacher(make_model) -> OwnTeacher:
    info = ModelInfo("nano", CLASSES, False, 0.96, DataConfig().mean, DataConfig().std)
    return OwnTeacher(make_model(seed=9), info)


def test_mae_and_decoder_take_no_part_and_everything_else_learns(make_model, make_batch):
    module = make_distill(used_model(make_model), teacher=own_teacher(make_model))
    module(make_batch(waveform=True))[0].backward()
    for name, parameter in module.model.named_parameters():
        if name.startswith(("mae.", "decoder.")):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert (parameter.grad != 0).any(), name


def test_the_teacher_is_frozen_and_no_part_of_the_module(make_model, make_batch):
    teacher = own_teacher(make_model)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = make_distill(make_model(), teacher=teacher)
    module.train()
    module(make_batch(waveform=True))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(part.training for part in teacher.model.modules())
    assert {id(p) for p in module.parameters()}.isdisjoint(id(p) for p in teacher.parameters())
    assert set(module.state_dict()) == {f"model.{name}" for name in module.model.state_dict()}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_even_a_teacher_that_could_learn_gets_no_gradient(make_model, make_batch):
    teacher = FixedTeacher()
    make_distill(make_model(), teacher=teacher)(make_batch(waveform=True))[0].backward()
    assert teacher.weight.grad is None


def test_what_ssl_froze_learns_again(make_model):
    model = make_model()
    model.requires_grad_(False)
    make_distill(model)
    assert model.head[1].weight.requires_grad and model.pos_embed.requires_grad


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_a_frozen_encoder_leaves_the_head_alone_to_learn(make_model, make_batch, pooling):
    model, batch = used_model(make_model, pooling=pooling), make_batch()
    expected = make_distill(model)(batch)[0].item()
    module = make_distill(model, frozen=True)
    loss, _ = module(batch)
    assert loss.item() == expected
    loss.backward()
    for name, parameter in model.named_parameters():
        learns = name.startswith(("head.", "pool."))
        assert parameter.requires_grad == learns, name
        assert (parameter.grad != 0).any() if learns and name != "pool.kv.bias" else parameter.grad is None or learns


def test_a_linear_probe_is_multinomial_regression_on_the_clip_features(make_model, make_batch):
    """The gradient of the head's bias is the mean of (probability - label), whatever the features."""
    model, batch = used_model(make_model), make_batch()
    make_distill(model, frozen=True)(batch)[0].backward()
    with torch.no_grad():
        logits, clip = model(batch.fbank)
        error = (logits.softmax(-1) - one_hot(batch)) / len(batch)
        torch.testing.assert_close(model.head[1].bias.grad, error.sum(0))
        torch.testing.assert_close(model.head[1].weight.grad, error.T @ model.head[0](clip))


def test_a_teacher_s_scores_teach_a_frozen_student_s_head(make_model, make_batch):
    model = used_model(make_model)
    module = make_distill(model, teacher=own_teacher(make_model), frozen=True, gamma=0.0)
    _, metrics = module(make_batch(waveform=True))
    assert set(metrics) == {"label", "teacher_label"}


# ------------------------------------------------------------------------------------------------------------- conduct


def test_the_same_batch_gives_the_same_loss_and_its_order_does_not_matter(make_model, make_batch):
    augmentation = AugmentConfig(time_roll=True, noise=0.2, time_mask=10, freq_mask=10)
    module = make_distill(used_model(make_model), teacher=FixedTeacher(), augmentation=augmentation)
    first, again = module(make_batch(waveform=True))[0], module(make_batch(waveform=True))[0]
    permuted = module(make_batch([3, 0, 4, 1, 2], waveform=True))[0]
    assert first.item() == again.item() and permuted.item() == pytest.approx(first.item(), rel=1e-5)


def test_metrics_are_detached_and_a_16_bit_student_has_float32_losses(make_model, make_batch):
    module = make_distill(used_model(make_model).bfloat16(), teacher=FixedTeacher())
    total, metrics = module(make_batch(waveform=True))
    assert total.requires_grad and not any(value.requires_grad for value in metrics.values())
    assert {value.dtype for value in (total, *metrics.values())} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_teacher_multiplies_in_the_student_s_precision(make_model, make_batch, dtype):
    class Asks(FixedTeacher):
        def __call__(self, waveform):
            self.precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            return super().__call__(waveform)

    teacher, batch = Asks(), make_batch(waveform=True)
    module = make_distill(used_model(make_model).to(dtype), teacher=teacher)
    scores, features = module.teach(batch.waveform)
    assert teacher.precision == dtype and scores.dtype == features.dtype == torch.float32
    exact = FixedTeacher()(batch.waveform)[1].detach()
    assert (features - exact).abs().max() <= (0 if dtype == torch.float32 else 0.02) * exact.abs().max()


def test_a_step_never_makes_the_host_wait(make_model, make_batch, no_waiting):
    """With multi-hot labels, because PyTorch's one_hot checks its input on a CPU, though not on a GPU."""
    batch = make_batch(multi_label=True, waveform=True)
    augmentation = AugmentConfig(mixup=0.5, time_roll=True, noise=0.2, time_mask=10, freq_mask=10)
    module = make_distill(make_model(), teacher=FixedTeacher(), multi_label=True, augmentation=augmentation)
    with no_waiting():
        module(batch)[0].backward()


def test_an_empty_projection_is_not_left_over_between_runs(make_model):
    """The module's parameters are the student's and the joining map's, nothing else."""
    module = make_distill(make_model(), teacher=FixedTeacher(embed_dim=10))
    names = {name for name, _ in module.named_parameters()}
    assert names == {f"model.{name}" for name, _ in module.model.named_parameters()} | {
        "projection.weight",
        "projection.bias",
    }
    assert isinstance(module.projection, nn.Linear) and dataclasses.is_dataclass(module.distill)


@pytest.mark.parametrize("multi_label", [False, True])
def test_asked_ahead_the_teacher_hears_a_step_at_once_and_says_the_same(make_model, make_batch, multi_label):
    augmentation = AugmentConfig(mixup=0.9, time_roll=True)
    batches = [make_batch(part, waveform=True, multi_label=multi_label) for part in ([0, 1, 2, 3], [4])]
    options = {"multi_label": multi_label, "augmentation": augmentation}
    module = make_distill(used_model(make_model), teacher=FixedTeacher(), **options)
    ahead = module.ask_ahead(batches)
    assert [len(batch) for batch in ahead] == [4, 1] and len(module.teacher.heard) == 1
    found = [module(batch) for batch in ahead]
    assert len(module.teacher.heard) == 1
    for (loss, terms), batch in zip(found, batches, strict=True):
        own_loss, own_terms = module(batch)
        torch.testing.assert_close(loss, own_loss, rtol=1e-5, atol=1e-6)
        assert terms.keys() == own_terms.keys() == {"label", "teacher_label", "regression"}
    assert module.ask_ahead(batches[1:])[0] is batches[1]  # one alone can wait for its own turn


def test_without_a_teacher_nobody_is_asked_ahead(make_model, make_batch):
    batches = [make_batch([0, 1]), make_batch([2])]
    assert make_distill(make_model()).ask_ahead(batches) is batches
