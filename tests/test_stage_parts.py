"""What the stages of a run are made of."""

import numpy as np
import pytest
import torch
from vit_files import google_arrays

from fastsskd import config, manifest
from fastsskd.datasets import open_data
from fastsskd.distill import Distill
from fastsskd.pretrain import Pretrain
from fastsskd.run_folder import RunFolder
from fastsskd.sampler import balanced_weights
from fastsskd.stage_parts import StageParts
from fastsskd.stochastic_depth import DropPath


@pytest.fixture
def make_parts(tones, tmp_path):
    """A function that makes the parts of a run over the tones; ``fields`` as for ``training.arguments``."""

    def make(**fields) -> StageParts:
        base = {"data__manifest": str(tones), "data__seconds": 0.96, "data__workers": 1, "model__size": "nano"}
        tree = {"run": {"out": str(tmp_path / "run")}}
        for name, value in {**base, **fields}.items():
            section, key = name.split("__")
            tree.setdefault(section, {})[key] = value
        settings = config.from_dict(tree)
        ds = {"train_batch_size": 8, "gradient_accumulation_steps": 2}
        data = open_data(settings, 8)
        return StageParts(settings, ds, data, torch.device("cpu"), RunFolder(settings, resume=False))

    return make


def test_plans_follow_the_configuration(make_parts):
    parts = make_parts(
        recipe__iterations=2, ssl__epochs=3, ssl__lr=0.1, distill__epochs=5, distill__lr=0.2, distill__warmup_epochs=0.5
    )
    plans = [parts.plan(stage) for stage in parts.stages]
    assert [plan.name for plan in plans] == ["iter1-ssl", "iter1-distill", "iter2-ssl", "iter2-distill"]
    assert [plan.steps_per_epoch for plan in plans] == [4] * 4  # 32 clips in batches of 8
    assert [plan.total_steps for plan in plans] == [12, 20, 12, 20]
    assert [plan.peak_lr for plan in plans] == pytest.approx([0.1, 0.2, 0.08, 0.16])
    assert [plan.warmup_steps for plan in plans] == [4, 2, 4, 2] and {plan.accumulation for plan in plans} == {2}
    assert len({plan.seed for plan in plans}) == 4


def test_each_stage_has_its_module_and_its_own_order(make_parts):
    parts = make_parts()
    orders = []
    for stage, kind in zip(parts.stages, (Pretrain, Distill), strict=False):
        assert type(parts.module(stage, parts.fresh_model(), None)) is kind
        loader = parts.loader(stage, None)
        orders.append(np.concatenate([batch.index.numpy() for batch in loader]))
        loader.close()
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()


def test_balanced_draws_are_for_the_labelled_stages(make_parts, monkeypatch):
    """Multi-SSL takes each clip once an epoch: it has no classes to balance."""
    seen = []
    monkeypatch.setattr("fastsskd.stage_parts.Loader", lambda clips, **options: seen.append(options["weights"]))
    parts = make_parts(data__sampling="balanced")
    for stage in parts.stages[:2]:
        parts.loader(stage, None)
    assert seen[0] is None and np.array_equal(seen[1], balanced_weights(parts.data.train))


def test_weights_of_the_manifest_are_for_all_stages(make_parts, monkeypatch):
    seen = []
    monkeypatch.setattr("fastsskd.stage_parts.Loader", lambda clips, **options: seen.append(options["weights"]))
    parts = make_parts(data__sampling="weights")
    for stage in parts.stages[:2]:
        parts.loader(stage, None)
    assert all(np.array_equal(weights, parts.data.train.weights) for weights in seen)


def test_a_model_file_will_say_what_the_configuration_says(make_parts, tones):
    info = make_parts(model__pooling="attentive", model__attention="simam").info()
    assert (info.size, info.pooling, info.attention, info.seconds) == ("nano", "attentive", "simam", 0.96)
    assert info.classes == manifest.load(tones).classes and not info.multi_label


def test_stochastic_depth_is_of_the_labelled_stages(make_parts):
    parts = make_parts(model__drop_path=0.3, recipe__stages=["distill"])
    ssl = make_parts(model__drop_path=0.3, recipe__stages=["ssl"])
    rates = [[m for m in p.start_model(p.stages[0]).modules() if isinstance(m, DropPath)] for p in (parts, ssl)]
    assert [path.drop_prob for path in rates[0]] == [0.3, 0.3] and rates[1] == []  # nano: the first of two blocks has 0


def test_model_init_is_where_the_first_stage_begins(make_parts, tmp_path):
    np.savez(tmp_path / "vit.npz", **google_arrays())
    parts = make_parts(model__init=str(tmp_path / "vit.npz"))
    parts.folder.path.mkdir()
    model, fresh = parts.start_model(parts.stages[0]), parts.fresh_model()
    assert not torch.equal(model.blocks[0].attn.qkv.weight, fresh.blocks[0].attn.qkv.weight)
    assert torch.equal(model.decoder[0].weight, fresh.decoder[0].weight)
    assert (parts.folder.path / "start-iter1-ssl.tsv").exists()
