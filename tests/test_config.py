"""The TOML: every key, type and limit is checked, and what is written down again is what was read."""

import dataclasses
from pathlib import Path

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from fastsskd import config
from fastsskd.errors import InputError, UsageError

PRESETS = Path(__file__).parents[1] / "launch/configs"
SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(config.Config)}
FIELDS = [(section, field) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]
BY_NAME = {f"{section}.{field.name}": field for section, field in FIELDS}
NUMBERS = [(section, field) for section, field in FIELDS if field.type in ("int", "float")]


def name_of(value) -> str:
    return value if isinstance(value, str) else getattr(value, "name", None)


def refusal(tree: dict, kind=UsageError) -> str:
    """The one line with which ``tree`` is refused."""
    with pytest.raises(InputError) as caught:
        config.from_dict(tree, source="my.toml")
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.startswith("my.toml: ") and "\n" not in text
    return text


def write(tmp_path, text: str):
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------- the keys


def test_an_empty_file_is_all_defaults(tmp_path):
    assert config.load(write(tmp_path, "")) == config.Config()


def test_the_defaults_are_the_paper_s():
    c = config.Config()
    assert (c.mask.inter_ratio, c.mask.intra_max_share, c.mask.intra_max_width) == (0.75, 0.5, 0.25)
    assert (c.mask.intra_p_time, c.mask.intra_p_freq) == (0.3, 0.3)
    assert (c.mask.inter_sampling, c.mask.hog_form) == ("hog", "gaussian")
    assert (c.ssl.lr, c.distill.lr, c.recipe.lr_decay, c.recipe.iterations) == (1.5e-4, 1.5e-4, 0.8, 3)
    assert (c.loss.alpha, c.loss.beta, c.loss.tau, c.distill.gamma) == (1.0, 1.0, 0.1, 1.0)
    assert (c.loss.restore_target, c.loss.restore_on) == ("spectrogram", "all")
    assert c.loss.hog_weight and not c.loss.raw_gradient
    assert all(getattr(c.loss, f"{k}_{v}") for k in ("restore", "mse", "kl", "contrast") for v in ("intra", "inter"))
    assert c.distill.labels and c.distill.teacher_labels and c.model.size == "base"
    assert c.data.seconds == 10.0 and c.num_samples == 160_000


def test_values_are_read_into_their_fields(tmp_path):
    text = '[run]\nout = "here"\nseed = 7\n[ssl]\nlr = 1\n[data]\ntrain_folds = [1, 2]\n[recipe]\nstages = ["ssl"]\n'
    c = config.load(write(tmp_path, text))
    assert (c.run.out, c.run.seed, c.ssl.lr, c.data.train_folds, c.recipe.stages) == ("here", 7, 1.0, (1, 2), ("ssl",))
    assert type(c.ssl.lr) is float  # a whole number is fine for a float
    assert c.distill.lr == 1.5e-4


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_refused_in_every_section(section):
    assert f"unknown key {section}.no_such_key" in refusal({section: {"no_such_key": 1}})


def test_a_misspelt_key_is_answered_with_the_right_one():
    assert refusal({"mask": {"inter_ration": 0.5}}).endswith("did you mean inter_ratio?")
    assert "known keys: epochs, lr" in refusal({"ssl": {"zzz": 1}})


def test_an_unknown_section_is_refused():
    assert "unknown section [optimizer]; there are run, data" in refusal({"optimizer": {}})
    assert "ssl must be a section, [ssl]" in refusal({"ssl": 5})


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_loads(path):
    config.load(path)


# -------------------------------------------------------------------------------------------------- types and limits


def wrong_values(kind: str) -> list:
    values = {"str": 1, "int": 1.0, "float": "0.5", "bool": 1}
    if kind in values:
        return [values[kind], None, [], {}, *([True] if kind in ("int", "float") else [])]
    values = [1, "ssl", {}, [None], [[1]]]
    return [value for value in values if value != "ssl"] if kind.startswith("str |") else values


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=name_of)
def test_a_value_of_the_wrong_type_is_refused_everywhere(section, field):
    for value in wrong_values(field.type):
        assert f"{section}.{field.name}: expected" in refusal({section: {field.name: value}})


@pytest.mark.parametrize(("section", "field"), NUMBERS, ids=name_of)
def test_a_number_out_of_range_is_refused_everywhere(section, field):
    low, high = field.metadata.get("low"), field.metadata.get("high")
    step = 1 if field.type == "int" else 1e-6
    outside = [low - step] if low is not None else []
    outside += [high + step] if high is not None else []
    outside += [float("nan"), float("inf"), float("-inf")] if field.type == "float" else []
    for value in outside:
        assert f"{section}.{field.name}: {value} is out of range" in refusal({section: {field.name: value}})
    for value in (low, high):
        if value is not None:  # the limits themselves are allowed, unless another field forbids it
            assert getattr(config._section(SECTIONS[section], section, {field.name: value}, "x"), field.name) == value


def test_every_number_has_a_lower_limit():
    unlimited = {field.name for _, field in NUMBERS if "low" not in field.metadata}
    assert unlimited == {"mean"}  # of log-mel features: any number can be one


def test_every_seed_that_is_accepted_can_be_used(make_model):
    high = BY_NAME["run.seed"].metadata["high"]
    make_model(seed=high)


@pytest.mark.parametrize(
    ("section", "field"), [(s, f) for s, f in FIELDS if "choices" in f.metadata and f.type == "str"], ids=name_of
)
def test_a_word_that_is_no_choice_is_refused(section, field):
    choices = field.metadata["choices"]
    assert refusal({section: {field.name: "no such word"}}).endswith(f"is not one of {', '.join(choices)}")
    for choice in choices:
        assert getattr(getattr(config.from_dict({section: {field.name: choice}}), section), field.name) == choice


def test_the_sizes_are_the_model_s():
    from fastsskd.model import ATTENTIONS, POOLINGS, SIZES

    assert BY_NAME["model.size"].metadata["choices"] == tuple(SIZES)
    assert BY_NAME["model.attention"].metadata["choices"] == ATTENTIONS
    assert BY_NAME["model.pooling"].metadata["choices"] == POOLINGS


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"mask": {"intra_p_time": 0.6, "intra_p_freq": 0.5}}, "intra_p_time + mask.intra_p_freq exceed 1"),
        ({"optim": {"betas": [0.9]}}, "optim.betas must be two numbers"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas must be two numbers"),
        ({"optim": {"betas": [-0.1, 0.9]}}, "optim.betas must be two numbers"),
        ({"recipe": {"stages": []}}, "recipe.stages must name"),
        ({"recipe": {"stages": ["ssl", "ssl"]}}, "recipe.stages must name"),
        ({"recipe": {"stages": ["ssl", "sleep"]}}, "'sleep' is not one of ssl, distill"),
        ({"data": {"train_folds": [1, 2], "eval_folds": [2]}}, "fold 2 is in both"),
        ({"distill": {"labels": False}}, "distill.labels = false needs a distill.teacher"),
        ({"distill": {"ema": 0.9, "select": "average"}}, "set distill.ema = 0, or distill.select = 'last'"),
        ({"distill": {"frozen": True}, "model": {"drop_path": 0.1}}, "model.drop_path would disturb: set it to 0"),
        ({"distill": {"frozen": True, "teacher": "a.pth"}}, "set distill.gamma = 0"),
        ({"distill": {"frozen": True, "stored": "answers"}}, "set distill.gamma = 0"),
        ({"distill": {"frozen": True, "teacher": "supervised", "gamma": 0.0}}, "a head on random features"),
        (
            {"loss": {f"{k}_{v}": False for k in ("restore", "mse", "kl", "contrast") for v in ("intra", "inter")}},
            "switches off all eight terms",
        ),
        ({"augment": {"ssl": True, "time_mask": 96}}, "set one of them, or ssl = false"),
    ],
)
def test_values_that_contradict_each_other_are_refused(tree, words):
    assert words in refusal(tree)


def test_contradictions_count_only_for_stages_that_run():
    off = {f"{k}_{v}": False for k in ("restore", "mse", "kl", "contrast") for v in ("intra", "inter")}
    config.from_dict({"loss": off, "recipe": {"stages": ["distill"]}})
    config.from_dict({"distill": {"labels": False}, "recipe": {"stages": ["ssl"]}})
    config.from_dict({"distill": {"labels": False, "teacher": "previous"}})
    config.from_dict({"distill": {"ema": 0.9, "select": "average"}, "recipe": {"stages": ["ssl"]}})
    config.from_dict({"distill": {"frozen": True}, "model": {"drop_path": 0.1}, "recipe": {"stages": ["ssl"]}})


def test_options_that_go_together_are_accepted():
    config.from_dict({"distill": {"ema": 0.999, "select": "best"}})
    config.from_dict({"distill": {"frozen": True, "ema": 0.999}, "model": {"pooling": "attentive"}})
    config.from_dict({"distill": {"frozen": True, "teacher": "a.pth", "gamma": 0.0}})


def test_several_teachers_are_a_list_of_checkpoints():
    several = config.from_dict({"distill": {"teacher": ["a.pth", "b"]}})
    assert several.distill.teacher == ("a.pth", "b")
    assert config.from_dict(config.to_dict(several)) == several
    for wrong in ([], [""], ["a.pth", "previous"], ["supervised"]):
        assert "distill.teacher as a list takes checkpoints" in refusal({"distill": {"teacher": wrong}})


# ----------------------------------------------------------------------------------------------------------- the file


def load_error(path) -> InputError:
    with pytest.raises(InputError) as caught:
        config.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


def test_an_absent_file_is_bad_input(tmp_path):
    present = write(tmp_path, "")
    for path in (tmp_path / "none.toml", tmp_path, present / "below-a-file.toml"):
        error = load_error(path)
        assert type(error) is InputError and "launch/configs/" in str(error)


@pytest.mark.parametrize("text", ["[run", "a = ", "x", "[run]\nseed = 1\nseed = 2"])
def test_a_file_that_is_no_toml_is_a_usage_error(tmp_path, text):
    assert type(load_error(write(tmp_path, text))) is UsageError


def test_a_binary_file_is_a_usage_error(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b"\xff\xfe\x00[run]")
    assert "not valid TOML" in str(load_error(path))


# ---------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("run.seed=3", "run.seed", 3),
        (" run.seed = 3 ", "run.seed", 3),
        ("ssl.lr=2e-4", "ssl.lr", 2e-4),
        ("ssl.lr=1", "ssl.lr", 1.0),
        ("loss.kl_intra=false", "loss.kl_intra", False),
        ("run.out=runs/a b", "run.out", "runs/a b"),
        ('run.out="quoted"', "run.out", "quoted"),
        ("run.out=a=b", "run.out", "a=b"),
        ("run.out=", "run.out", ""),
        ("data.eval_folds=[1, 2]", "data.eval_folds", (1, 2)),
        ('recipe.stages=["ssl"]', "recipe.stages", ("ssl",)),
    ],
)
def test_set_reads_a_toml_value_or_else_a_plain_word(tmp_path, text, field, value):
    c = config.load(write(tmp_path, "[run]\nseed = 1\n"), [text])
    section, key = field.split(".")
    assert getattr(getattr(c, section), key) == value


def test_the_last_override_wins(tmp_path):
    assert config.load(write(tmp_path, ""), ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("text", ["run.seed", "seed=1", "=1", "run.=1", ".seed=1", "run.seed.x=1", ""])
def test_set_of_another_form_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match=r"write it as section\.key=value"):
        config.load(write(tmp_path, ""), [text])


def test_set_is_checked_like_the_file(tmp_path):
    path = write(tmp_path, "top = 1\n")
    with pytest.raises(UsageError, match="top is not a section"):
        config.load(path, ["top.x=1"])
    path = write(tmp_path, "")
    for text, words in (
        ("run.sead=1", "did you mean seed"),
        ("run.seed=x", "expected int"),
        ("model.size=huge", "is not one of"),
    ):
        with pytest.raises(UsageError, match=words):
            config.load(path, [text])


# --------------------------------------------------------------------------------------------------------- written out

# A path may hold anything but a zero byte; TOML itself cannot hold half a surrogate pair.
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def values_of(field) -> st.SearchStrategy:
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if "choices" in field.metadata:
        choice = st.sampled_from(field.metadata["choices"])
        return choice if field.type == "str" else st.lists(choice, min_size=1, max_size=2, unique=True).map(tuple)
    return {
        "bool": st.booleans(),
        "str": words,
        "str | tuple[str, ...]": words | st.lists(words, max_size=3).map(tuple),
        "int": st.integers(low, high if high is not None else 10**9),
        "float": st.floats(low, high if high is not None else 1e9, allow_infinity=False),
        "tuple[int, ...]": st.lists(st.integers(0, 9), max_size=4).map(tuple),
        "tuple[float, ...]": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    }[field.type]


@given(data=st.data())
def test_the_resolved_configuration_reads_back_as_itself(data):
    section, field = data.draw(st.sampled_from(FIELDS))
    part = dataclasses.replace(SECTIONS[section](), **{field.name: data.draw(values_of(field))})
    c = dataclasses.replace(config.Config(), **{section: part})
    again = config._section(SECTIONS[section], section, tomllib.loads(config.to_toml(c))[section], "dump")
    assert again == part


def test_the_dump_of_any_valid_file_loads_again(tmp_path):
    c = config.load(
        write(
            tmp_path, '[run]\nout = "ü \\"x\\" \\\\ 😀"\n[data]\ntrain_folds = [1]\n[distill]\nteacher = "previous"\n'
        ),
        ["ssl.lr=1e-9", "recipe.lr_decay=1", "mask.hog_form=printed"],
    )
    path = tmp_path / "resolved.toml"
    path.write_text(config.to_toml(c), encoding="utf-8")
    assert config.load(path) == c
    assert config.from_dict(config.to_dict(c)) == c


def test_every_field_is_documented_in_the_dump():
    text = config.to_toml(config.Config())
    for section, field in FIELDS:
        assert field.metadata["doc"], field.name
        assert f"[{section}]" in text and f"\n{field.name} = " in text
        assert field.metadata["doc"] in text


def test_a_configuration_cannot_be_changed_in_passing():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().run.seed = 1
