"""Which stage begins with whose weights, and who teaches it."""

import pytest

from fastsskd.config import from_dict
from fastsskd.stages import plan_stages


def plan(iterations=2, stages=("ssl", "distill"), teacher="") -> list[tuple[str, str | None, str | None]]:
    tree = {"recipe": {"iterations": iterations, "stages": list(stages)}, "distill": {"teacher": teacher}}
    return [(stage.name, stage.start, stage.teacher) for stage in plan_stages(from_dict(tree))]


def test_each_stage_begins_where_the_last_one_ended():
    assert plan(iterations=3) == [
        ("iter1-ssl", None, None),
        ("iter1-distill", "iter1-ssl", None),
        ("iter2-ssl", "iter1-distill", None),
        ("iter2-distill", "iter2-ssl", None),
        ("iter3-ssl", "iter2-distill", None),
        ("iter3-distill", "iter3-ssl", None),
    ]


def test_a_checkpoint_teaches_every_distillation():
    assert plan(teacher="some/model.safetensors") == [
        ("iter1-ssl", None, None),
        ("iter1-distill", "iter1-ssl", "some/model.safetensors"),
        ("iter2-ssl", "iter1-distill", None),
        ("iter2-distill", "iter2-ssl", "some/model.safetensors"),
    ]


def test_several_teachers_are_those_of_every_distillation():
    stages = plan(teacher=["a.pth", "b.pt"])
    assert [teacher for _, _, teacher in stages] == [None, ("a.pth", "b.pt"), None, ("a.pth", "b.pt")]


def test_a_supervised_teacher_is_trained_first_and_lends_no_weights():
    assert plan(teacher="supervised") == [
        ("teacher", None, None),
        ("iter1-ssl", None, None),
        ("iter1-distill", "iter1-ssl", "teacher"),
        ("iter2-ssl", "iter1-distill", None),
        ("iter2-distill", "iter2-ssl", "teacher"),
    ]


def test_iterations_count_from_one_and_the_teacher_s_is_zero():
    """The learning rate's decay goes by this number."""
    stages = plan_stages(from_dict({"recipe": {"iterations": 2}, "distill": {"teacher": "supervised"}}))
    assert [(stage.kind, stage.iteration) for stage in stages] == [
        ("teacher", 0),
        ("ssl", 1),
        ("distill", 1),
        ("ssl", 2),
        ("distill", 2),
    ]


def test_the_previous_iteration_s_model_teaches_from_the_second_on():
    expected = [None, "iter1-distill", "iter2-distill"]
    assert [teacher for name, _, teacher in plan(3, teacher="previous") if name.endswith("distill")] == expected
    assert [teacher for _, _, teacher in plan(3, stages=["distill"], teacher="previous")] == expected


def test_previous_is_the_last_model_that_learned_labels_whatever_the_order():
    reversed_order = plan(2, stages=["distill", "ssl"], teacher="previous")
    assert reversed_order[2] == ("iter2-distill", "iter1-ssl", "iter1-distill")


@pytest.mark.parametrize("kind", ["ssl", "distill"])
def test_one_kind_alone(kind):
    assert plan(2, stages=[kind]) == [(f"iter1-{kind}", None, None), (f"iter2-{kind}", f"iter1-{kind}", None)]


def test_no_teacher_is_trained_for_ssl_alone():
    assert [name for name, _, _ in plan(1, stages=["ssl"], teacher="supervised")] == ["iter1-ssl"]
