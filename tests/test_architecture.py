"""The house's rules, read from the source: data goes one way, and rooms stay small enough to know."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = {
    ".".join(path.relative_to(ROOT / "fastsskd").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "fastsskd").rglob("*.py"))
}
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCES = [
    path for top in ("fastsskd", "kernels", "launch", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))
]

# A module imports from its own floor and those below it. A module that is not listed lives on the roof: it may use
# everything, and nothing below may use it until it is given a floor here.
FLOORS = (
    "answers audio evaluation inference layouts pack plan profile report starting "  # rooms: a docstring each
    "errors batch distributed durable skip_log clip_bytes alive bad_steps clip_file sound_synthesis foreign "
    "hardware text_table config_rules answers.row_file answers.scores audio.info audio.chunks audio.flac "
    "audio.ogg audio.file audio.mp3 audio.ffmpeg audio.ffmpeg_process audio.any_format audio.encoding "
    "inference.windows inference.npy_file profile.stats starting.report starting.vit_file",
    "config ds_config class_map patches clip_table clip_columns split manifest sound_events config_help "
    "layouts.files_present layouts.listed layouts.tar layouts.index",
    "attention layer_norm linear model flops losses augment decode clip_reader packed_clips recycle sampler stream "
    "loader datasets stochastic_depth health schedule stages answers.stored evaluation.metrics evaluation.clip_lengths "
    "pack.shards plan.memory plan.cost plan.loader plan.measured plan.scale",
    "views weights starting.imagenet starting.initialise",
    "pretrain distill teachers",
    "engine selection checkpoint check figures progress run_folder stage_parts moving_average recipe "
    "engine_state job_pool many_runs peak api answers.folder answers.teach evaluation.evaluate evaluation.kfold "
    "evaluation.probe evaluation.score_file evaluation.intervals evaluation.confusion evaluation.table "
    "inference.predict inference.sources inference.listen inference.loaded inference.embed inference.export "
    "inference.onnx_model pack.folder pack.clip pack.report pack.job pack.run plan.measure plan.job plan.report "
    "profile.job profile.runs profile.silence profile.stages profile.disk profile.step profile.verdict "
    "profile.run profile.advice profile.trial profile.report profile.page report.run_table report.charts "
    "report.data report.html report.curves report.scores report.page report.folds report.reference",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}

MAX_FUNCTION_LINES, MAX_FILE_LINES = 56, 380
"""A ratchet at about today's longest, docstrings not counted; we aim at 40 and 300. Lower them when you can."""


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, inside functions too; ``from a import b`` counts as ``a`` and as ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """Which of our modules a file imports."""
    names = {name.removeprefix("fastsskd.") for name in imported(path) if name.startswith("fastsskd.")}
    return names & set(PACKAGE)


def floor_of(module: str) -> int:
    return FLOOR.get(module, FLOOR.get(module.split(".")[0], len(FLOORS)))


@pytest.mark.parametrize("module", PACKAGE)
def test_imports_go_down(module):
    up = {name for name in own_imports(PACKAGE[module]) if floor_of(name) > floor_of(module)}
    assert not up, f"fastsskd/{module} is on floor {floor_of(module)} and must not import {', '.join(sorted(up))}"


def test_no_import_goes_in_a_circle():
    below = {module: own_imports(path) - {module} for module, path in PACKAGE.items()}
    while below:
        free = {module for module, names in below.items() if not names & set(below)}
        assert free, f"these import each other in a circle: {', '.join(sorted(below))}"
        below = {module: names for module, names in below.items() if module not in free}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_know_arrays_and_nothing_of_the_trainer(path):
    tops = {name.split(".")[0] for name in imported(path)}
    foreign = tops - set(sys.stdlib_module_names) - {"numpy", "torch", "numba", "llvmlite", "fastsskd_kernels"}
    assert not foreign
    assert not tops & {"logging", "random", "json"}


@pytest.mark.parametrize("module", PACKAGE)
def test_the_library_does_not_know_its_scripts(module):
    tops = {name.split(".")[0] for name in imported(PACKAGE[module])}
    assert not tops & {"launch", "benchmarks", "tests", "kernels"}


def test_one_file_alone_knows_dali():
    users = {module for module, path in PACKAGE.items() if any(name.startswith("nvidia") for name in imported(path))}
    assert users == {"decode"}


def test_nobody_uses_triton():
    assert [path for path in SOURCES if any("triton" in name.lower() for name in imported(path))] == []


@pytest.mark.parametrize("module", ["pretrain", "distill", "losses", "views", "model", "augment"])
def test_a_step_does_not_wait_for_the_device(module):
    """No value is read back; tests/conftest.py's ``no_waiting`` watches the same while a step runs.

    A function whose name ends in ``_cpu`` is never called for a GPU's tensors, so it may.
    """
    waiting = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "masked_select"}
    tree = ast.parse(PACKAGE[module].read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not getattr(node, "name", "").endswith("_cpu")]
    calls = [
        f"line {node.lineno}: .{node.func.attr}()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waiting
    ]
    assert calls == []


@pytest.mark.parametrize("module", PACKAGE)
def test_every_module_can_be_imported_without_a_gpu(module):
    if module == "decode":
        pytest.importorskip("nvidia.dali")
    importlib.import_module(f"fastsskd.{module}" if module != "__init__" else "fastsskd")


def code_lines(function: ast.AST) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert [f"{f.name}: {code_lines(f)} lines" for f in functions if code_lines(f) > MAX_FUNCTION_LINES] == []


def test_the_launch_script_is_thin():
    assert len((ROOT / "launch/train.py").read_text(encoding="utf-8").splitlines()) <= 120
