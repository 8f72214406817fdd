"""The README and the pages in docs/: every command parses, those of the main paths run, links and quotations hold."""

import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from deepspeed.launcher import runner
from small_checkpoint import CLASSES, save_checkpoint, save_sound, sound
from torch.distributed.run import get_args_parser as torchrun_parser
from training import ForkedTraining

from fastsskd import cli, config, ds_config
from launch import kfold, train

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
SECTIONS = ("run", "data", "mask", "model", "loss", "ssl", "distill", "optim", "recipe", "augment")
PARSERS = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def blocks(page: str, language: str, under: str = "") -> list[str]:
    """What is fenced as ``language``, below the heading ``under`` and above the next."""
    text = PAGES[page]
    if under:
        start = re.search(rf"^#+ {re.escape(under)}\n", text, re.MULTILINE).end()
        text = re.split(r"^#+ ", re.sub(r"(?m)^# ", "", text[start:]), maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str, under: str = "") -> list[list[str]]:
    """The words of each command line; where its output goes is left out."""
    lines = [line for block in blocks(page, "bash", under) for line in re.sub(r"\\\n", " ", block).splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[: line.index(">")] if ">" in line else line for line in words if line]


def every_command() -> list:
    return [pytest.param(words, id=f"{page}: {' '.join(words)[:60]}") for page in PAGES for words in commands(page)]


# ------------------------------------------------------------------------------------------------- each command parses


def split_launcher(words: list[str]) -> tuple[str, list[str]]:
    """The script or module that a launcher starts, by the launcher's own parser, and its arguments."""
    if words[0] == "deepspeed":
        args = runner.parse_args(words[1:])
        return args.user_script, args.user_args
    if words[0] == "torchrun":
        args = torchrun_parser().parse_args(words[1:])
        return args.training_script, args.training_script_args
    if words[0] == "sbatch":
        known = ("--nodes=", "--gpus-per-node=", "--cpus-per-task=", "--time=")
        place = next(i for i, word in enumerate(words[1:], 1) if not word.startswith(known))
        assert words[place] == "launch/slurm.sh"
        return "launch/train.py", words[place + 1 :]
    assert words[0] == "python"
    return words[1], words[2:]


class Parsed(Exception):
    """How a script is left once its arguments are known: with them."""


def parse_benchmark(script: str, given: list[str], monkeypatch) -> argparse.Namespace:
    """As the script's own parser takes them; nothing else of it runs."""

    def parse(parser, arguments=None, namespace=None):
        unknown = argparse.ArgumentParser.parse_known_args
        args, rest = unknown(parser, given if arguments is None else arguments, namespace)
        assert rest == []
        raise Parsed(args)

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(Path(script).stem)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed) as parsed:
        module.main(given)
    return parsed.value.args[0]


def understood(words: list[str], monkeypatch) -> argparse.Namespace | None:
    """What a command's own parser makes of it; None of those that have none of ours."""
    if words[0] == "fastsskd":
        return cli._parser().parse_args(words[1:])
    if words[0] in ("deepspeed", "torchrun", "python", "sbatch"):
        script, given = split_launcher(words)
        if script == "fastsskd.cli":
            return cli._parser().parse_args(given)
        assert (ROOT / script).is_file()
        if script.startswith("benchmarks/"):
            return parse_benchmark(script, given, monkeypatch)
        return {"launch/train.py": train, "launch/kfold.py": kfold}[script].parse(given)
    if words[0] in ("bash", "source"):
        assert (ROOT / words[1]).is_file()
    else:
        assert words[:2] in (["git", "clone"], ["pip", "install"]) or words in (["ruff", "format", "."], [".ci/run"])
    return None


@pytest.mark.parametrize("words", every_command())
def test_a_command_is_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = understood(words, monkeypatch)
    if args is not None and getattr(args, "config", None):
        settings = config.load(args.config, args.set)
        if getattr(args, "ds_config", None):
            ds_config.load(args.ds_config)
        assert settings.run.out


def test_the_pages_have_commands_and_no_line_escapes():
    counts = {page: len(commands(page)) for page in PAGES}
    assert counts["README.md"] > 10 and counts["docs/data.md"] > 15 and counts["docs/cluster.md"] > 8
    assert all("..." not in line for page in PAGES for block in blocks(page, "bash") for line in uncommented(block))
    fences = [fence for text in PAGES.values() for fence in re.findall(r"^```(\w*)$", text, re.MULTILINE)[::2]]
    assert set(fences) <= {"bash", "python", "text", ""}


def uncommented(block: str) -> list[str]:
    return [line.partition("#")[0] for line in block.splitlines()]


# -------------------------------------------------------------------------------------------------- what is said inline


def inline(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES)
def test_what_is_said_inline_exists(page):
    """Files, fields of the TOML with their values, commands and their options."""
    for code in inline(page):
        if re.match(r"(launch|benchmarks|fastsskd|kernels|tests|docs)/[\w./*]*$", code) and code != "launch/hostfile":
            assert list(ROOT.glob(code.rstrip("/"))), code
        for section, field in re.findall(rf"(?:^|[ '])({'|'.join(SECTIONS)})\.([a-z]\w*)", code):
            assert field in ("py", "safetensors") or hasattr(getattr(config.Config(), section), field), code
        assigned = re.fullmatch(rf"(?:--set )?'?((?:{'|'.join(SECTIONS)})\.\w+ ?=.*?)'?", code)
        if assigned:
            text = re.sub(r" ?= ?", "=", assigned[1], count=1)
            config.load(ROOT / "launch/configs/quickstart.toml", ["distill.teacher=", text])
        if code.startswith("fastsskd "):
            name, *rest = re.split(r"[ ,]+", code.removeprefix("fastsskd "))
            options = {option for action in PARSERS[name]._actions for option in action.option_strings}
            assert {word for word in rest if word.startswith("--")} <= options, code


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            assert re.match(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+$", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page}: {target}"


def test_the_table_of_pages_has_every_page():
    assert set(re.findall(r"\]\((docs/\w+\.md)\)", PAGES["README.md"])) == {p for p in PAGES if p.startswith("docs/")}
    assert len(PAGES["README.md"].splitlines()) <= 230


def templates() -> list[str]:
    """Every string of the library and of train.py, with a mark where something is put into it."""
    found = []
    for path in (ROOT / "launch/train.py", *sorted((ROOT / "fastsskd").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        getattr(part, "value", "") if isinstance(part, ast.Constant) else "\0" for part in node.values
                    )
                )
    return found


def test_quoted_messages_are_ours():
    """Of each message, what stands between dots is in one message of the source, in that order."""
    known = templates()
    quoted = [line for block in blocks("docs/troubleshooting.md", "text") for line in block.splitlines()]
    assert len(quoted) > 30
    for message in quoted:
        pieces = [piece for piece in message.removeprefix("error: ").split("...") if len(piece.strip()) > 3]
        assert sum(map(len, pieces)) > 12, message
        if not any(in_order(pieces, text) for text in known):
            # One message within another: then clause by clause.
            clauses = [clause for piece in pieces for clause in re.split(r"[:;] ", piece) if len(clause) > 3]
            assert all(any(clause in text for text in known) for clause in clauses), message


def in_order(pieces: list[str], text: str) -> bool:
    return re.search(".*".join(map(re.escape, pieces)), text, re.DOTALL) is not None


def test_the_house_names_every_file_and_only_those():
    page = PAGES["docs/house.md"]
    named = set()
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        folder = re.match(r"`([\w/]+)/`", section)[1]
        for row in re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE):
            named |= {f"{folder}/{name}" for name in re.findall(r"`([^`]+)`", row)}
    for name in named:
        assert list(ROOT.glob(name)), name
    modules = {
        path.relative_to(ROOT).as_posix()
        for top in ("fastsskd", "kernels", "launch", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    launched = {
        path.relative_to(ROOT).as_posix() for kind in ("*.sh", "*.json") for path in ROOT.glob(f"launch/{kind}")
    }
    assert (modules | launched) - named == set()


def test_the_layouts_are_those_of_the_reader():
    """The table in docs/data.md has a row for each that `fastsskd.layouts.index` recognises."""
    from fastsskd.layouts import index

    rows = re.findall(r"^\| ([\w ,-]+?) \|", index.__doc__, re.MULTILINE)[1:]
    section = PAGES["docs/data.md"].partition("## Layouts")[2].partition("## The steps")[0]
    assert set(re.findall(r"^\| ([\w ,-]+?) \|", section, re.MULTILINE)[1:]) == set(rows)


@pytest.mark.parametrize(
    ("row", "recipe"),
    [("AudioSet-2M", "audioset2m"), ("AudioSet-20K", "audioset20k_balanced"), ("VGGSound", "vggsound")],
)
def test_the_hours_are_those_of_the_plan(row, recipe, capsys, monkeypatch):
    (line,) = re.findall(rf"^\| {row} \| (\d.+) \|$", PAGES["docs/data.md"], re.MULTILINE)
    clips, _, eight, all_32 = line.split(" | ")
    monkeypatch.chdir(ROOT)
    files = ["--config", f"launch/configs/{recipe}.toml", "--ds_config", "launch/ds_config_v100.json"]
    assert cli.main(["plan", *files, "--clips", clips.replace(",", ""), "--gpus", "8", "32", "--json"]) == 0
    planned = {plan["gpus"]: plan["hours"] for plan in json.loads(capsys.readouterr().out)["plans"]}
    for gpus, said in ((8, eight), (32, all_32)):
        hours = float(said.split()[0])
        assert hours == pytest.approx(planned[gpus], abs=0.05 if hours < 10 else 0.5)


@pytest.mark.parametrize("row", ["as the file is", "`model.activation_checkpointing=true`"])
def test_what_a_v100_holds_is_what_the_plan_says(row, capsys, monkeypatch):
    (line,) = re.findall(rf"^\| {re.escape(row)} \| (.+) \|$", PAGES["docs/cluster.md"], re.MULTILINE)
    gigabytes, largest_16, largest_32, hours = line.split(" | ")
    sets = ["--set", row.strip("`")] if "=" in row else []
    monkeypatch.chdir(ROOT)
    files = ["--config", "launch/configs/audioset2m.toml", "--ds_config", "launch/ds_config_v100.json"]
    for gpu, largest in (("V100-16", largest_16), ("V100-32", largest_32)):
        assert cli.main(["plan", *files, *sets, "--gpu", gpu, "--gpus", "32", "--json"]) == 0
        (plan,) = json.loads(capsys.readouterr().out)["plans"]
        assert plan["largest_micro"] == int(largest) and plan["sizes"]["micro"] == 8
        assert plan["memory"]["2"]["total"] / 1e9 == pytest.approx(float(gigabytes.split()[0]), abs=0.06)
        assert plan["hours"] == pytest.approx(float(hours), abs=0.05)


# ----------------------------------------------------------------------------------------- the main paths, run in order

SHORT = {
    "model.size": "nano",
    "model.drop_path": 0,
    "data.seconds": 0.96,
    "data.workers": 1,
    "ssl.epochs": 1,
    "ssl.warmup_epochs": 0.5,
    "distill.epochs": 1,
    "distill.warmup_epochs": 0.5,
    "run.log_every": 1,
}


class User:
    """Follows a page: its commands, in order, with small things in place of what is named there.

    Args:
        folder: where the commands run.
        training: ranks that start at once.
    """

    def __init__(self, folder: Path, training: ForkedTraining):
        self.folder, self.training = folder, training

    def follow(self, page: str, under: str, **how) -> list[str]:
        """Run all commands below a heading; returns the programs that ran."""
        return [self.do(words, **how) for words in commands(page, under)]

    def do(self, words: list[str], *, short=(), more=(), instead=(), expect=0, harm=()) -> str:
        """Run one.

        Args:
            short: fields of a training beside ``SHORT``; more: arguments that are appended, by program.
            instead: words that stand in for others; of None both they and the option before them are left out.
            expect, harm: exit code, and what goes wrong in a training, see ``training.py``.
        """
        words = self._instead(words, dict(instead))
        if words[0] in ("git", "source", "bash"):
            return words[0]
        if words[0] == "fastsskd":
            code = cli.main([*words[1:], *dict(more).get(words[1], ())])
            assert code == expect, " ".join(words)
            return words[1]
        script, given = split_launcher(words)
        given = [*given, *dict(more).get(Path(script).name, ())]
        for name, value in {**SHORT, **dict(short)}.items():
            given += ["--set", f"{name}={value}"]
        if script == "launch/kfold.py":
            assert kfold.main(given) == expect
        else:
            assert script == "launch/train.py"
            self.training.call("launch.train.main", *given, expect=expect, harm=harm)
        return Path(script).name

    @staticmethod
    def _instead(words: list[str], instead: dict[str, str | None]) -> list[str]:
        gone = {i for i, word in enumerate(words) if word in instead and instead[word] is None}
        gone |= {i - 1 for i in gone}
        return [instead.get(word, word) for i, word in enumerate(words) if i not in gone]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """In a folder with launch/ of the checkout and nothing else."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "launch").symlink_to(ROOT / "launch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with ForkedTraining(tmp_path_factory.mktemp("logs")) as training:  # its ranks are in that folder too
            yield User(folder, training)


@pytest.fixture(scope="module")
def mine(user):
    """After the README's "Your own data", on recordings in several formats, one of them broken."""
    for i, name in enumerate(CLASSES[:2] * 16):
        suffix, rate = (("wav", 8000), ("mp3", 48000), ("ogg", 44100), ("flac", 22050))[i // 2 % 4]
        save_sound(user.folder / f"recordings/{name}/Aufnahme {i}.{suffix}", 1.2, rate, seed=i, channels=1 + i % 2)
    broken = user.folder / "recordings/cat/größer.flac"
    broken.write_bytes((user.folder / "recordings/cat/Aufnahme 6.flac").read_bytes()[:9000])
    (user.folder / "recordings/dog/cover.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    save_sound(user.folder / "new/a.wav", 3.0)
    ran = user.follow("README.md", "Your own data")
    assert ran == ["index", "pack", "stats", "train.py", "predict"]
    assert "größer" in (user.folder / "packed/rejected.tsv").read_text()
    return user.folder / "runs/mine"


@pytest.mark.slow
def test_own_data_and_its_report(user, mine, capsys):
    assert (mine / "checkpoints/iter2-distill/model.safetensors").exists()
    assert user.follow("README.md", "Is it learning?") == ["report"]
    assert (mine / "report.html").exists()


@pytest.mark.slow
def test_using_a_model(user, mine, capsys):
    for name, seconds in (("a.wav", 1.0), ("b.mp3", 1.0), ("folder/c.ogg", 2.0), ("hour.flac", 20.0)):
        save_sound(user.folder / name, seconds)
    shutil.copy(user.folder / "my.manifest", user.folder / "more.manifest")
    (user.folder / "C").symlink_to(mine / "checkpoints/iter2-distill")
    predicts = [words for words in commands("README.md", "Using a model") if words[1] == "predict"]
    rest = [words for words in commands("README.md", "Using a model") if words[1] != "predict"]
    user.do(predicts[0], expect=1)  # the broken recording is in the manifest
    assert "größer" in capsys.readouterr().err
    user.do(predicts[1])
    assert capsys.readouterr().out.startswith("path,start,end,class,score")
    if importlib.util.find_spec("onnxruntime") is None:
        rest = [words[: words.index("--onnx")] if "--onnx" in words else words for words in rest]
    assert [user.do(words) for words in rest] == ["embed", "export"]
    assert np.load(user.folder / "features.npy").shape[0] == 1 and (user.folder / "given/config.json").exists()


@pytest.mark.slow
def test_stopped_and_resumed(user, mine):
    first, *_ = commands("docs/training.md", "Training")
    (resume,) = commands("docs/training.md", "The run's folder")
    assert resume == [*first, "--resume"]
    other = {
        "instead": {"run.out=runs/mine": "run.out=runs/stopped", "data.manifest=my.manifest": "data.manifest=packed"}
    }
    stop = {"do": "terminate", "function": "fastsskd.engine._optimize", "calls": [2]}
    user.do(first, **other, expect=1, harm=[stop])
    assert '"status": "stopped"' in (user.folder / "runs/stopped/result.json").read_text()
    user.do(resume, **other)
    assert '"status": "complete"' in (user.folder / "runs/stopped/result.json").read_text()


@pytest.mark.slow
def test_stored_answers(user, mine):
    instead = {
        "audioset_10_10_0.4593.pth": "runs/mine/checkpoints/iter1-distill",
        "class_labels_indices.csv": None,
        "my.manifest": "packed",
        "data.manifest=my.manifest": "data.manifest=packed",
    }
    ran = user.follow("docs/training.md", "Stored answers", instead=instead, more={"teach": ["--seconds", "0.96"]})
    assert ran == ["teach", "train.py"]
    assert "teacher_label" in (user.folder / "runs/taught/metrics.jsonl").read_text()


@pytest.mark.slow
def test_esc50_step_by_step(user, capsys):
    """On a set of ESC-50's shape: 60 clips in 2 classes and 5 folds."""
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for i in range(60):
        name, target = f"{i % 5 + 1}-{i}-A-{i % 2}.wav", i % 2
        rows.append(f"{name},{i % 5 + 1},{target},{('dog', 'rain')[target]},True,{i},A")
        save_sound(user.folder / "ESC-50/audio" / name, 1.0, 44100, seed=i)
    (user.folder / "ESC-50/meta").mkdir()
    (user.folder / "ESC-50/meta/esc50.csv").write_text("\n".join(rows) + "\n")
    kept = ["--folds", "2", "--keep", "result", "--set", "recipe.iterations=1", "--threads", "1"]
    ran = user.follow("docs/data.md", "ESC-50", more={"kfold.py": kept})
    assert ran == ["git", "index", "check", "stats", "pack", "train.py", "evaluate", "kfold.py", "report"]
    assert '"num_clips": 12' in capsys.readouterr().out  # one fold
    assert (user.folder / "confusion.png").exists() and (user.folder / "runs/esc50-folds/report.html").exists()
    # What "Evaluation" has: another fold's clips, and frozen features.
    words = [words for words in commands("docs/training.md", "Evaluation") if words[1] in ("evaluate", "probe")]
    where = {
        f"runs/mine/checkpoints/{name}": f"runs/esc50-fold5/checkpoints/{name}"
        for name in ("iter2-distill", "iter1-ssl")
    }
    assert [user.do(line, instead=where | {"my.manifest": "esc50.manifest"}) for line in words] == ["evaluate", "probe"]


AUDIOSET_HEAD = "# Segments csv created\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"
SMALL = {"recipe.iterations": 1, "augment.time_mask": 24, "augment.freq_mask": 16}
ANY_MACHINE = {"launch/ds_config_v100.json": "launch/ds_config.json"}


@pytest.mark.slow
def test_audioset_step_by_step(user, capsys):
    """Two classes, clips with both; one clip of each list is not there."""
    folder, mids = user.folder / "AudioSet", ("/m/09x0r", "/m/04rlf")
    for number, (name, count) in enumerate((("balanced_train", 12), ("unbalanced_train", 24), ("eval", 12))):
        lines = []
        for i in range(count + 1):
            ytid, labels = f"{number}-{i:09d}", ",".join(mids[: 1 + i % 3 // 2] if i % 2 else mids[1:])
            lines.append(f'{ytid}, {i}.000, {i + 10}.000, "{labels}"')
            if i < count:
                save_sound(folder / "audio" / f"{'Y' * (i % 2)}{ytid}.flac", 1.0, 32000, seed=100 * number + i)
        (folder / f"{name}_segments.csv").write_text(AUDIOSET_HEAD + "\n".join(lines) + "\n")
    names = [f"{i},{mid},{name}" for i, (mid, name) in enumerate(zip(mids, ("Speech", "Music"), strict=True))]
    (folder / "class_labels_indices.csv").write_text("index,mid,display_name\n" + "\n".join(names) + "\n")
    other = {"packed": "audioset", "data.manifest=packed": "data.manifest=audioset"}
    ran = user.follow("docs/data.md", "AudioSet", instead=other | ANY_MACHINE, short=SMALL)
    assert ran == ["index", "pack", "stats", "plan", "train.py"]
    said = capsys.readouterr()
    assert "48 clips, 2 classes, layout audioset" in said.err and "left out 3 clips that are listed" in said.err
    result = json.loads((user.folder / "runs/audioset2m/result.json").read_text())
    assert (result["num_train"], result["num_eval"]) == (36, 12) and result["metrics"]["mAP"] > 0


@pytest.mark.slow
def test_vggsound_step_by_step(user, capsys):
    lines = []
    for i in range(40):
        side, label = ("train", "test")[i % 5 == 0], ("dog barking", '"people, crowd"')[i // 5 % 2]
        lines.append(f"vgg{i:08d},{i},{label},{side}")
        save_sound(user.folder / "VGGSound/audio" / f"vgg{i:08d}_{i:06d}.wav", 1.0, 48000, seed=i, channels=2)
    (user.folder / "VGGSound/vggsound.csv").write_text("\n".join(lines) + "\n")
    other = {"packed": "vggsound", "data.manifest=packed": "data.manifest=vggsound"}
    ran = user.follow("docs/data.md", "VGGSound", instead=other | ANY_MACHINE, short=SMALL)
    assert ran == ["index", "pack", "stats", "train.py"]
    assert "40 clips, 2 classes, layout vggsound" in capsys.readouterr().err
    result = json.loads((user.folder / "runs/vggsound/result.json").read_text())
    assert (result["num_train"], result["num_eval"]) == (32, 8)


def test_the_python_lines(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "runs/mine/checkpoints/iter2-distill")
    save_sound(tmp_path / "a.wav", 1.0)
    soundfile.write(tmp_path / "b.mp3", sound(1.0), 16000)
    monkeypatch.chdir(tmp_path)
    found = [block for page in PAGES for block in blocks(page, "python")]
    assert found
    for block in found:
        # The value of the last line, as a person at a prompt sees it.
        *lines, last = block.strip().splitlines()
        names = {}
        exec("\n".join(lines), names)
        assert eval(last, names).shape == (2, names["model"].embed_dim)
        assert names["model"].classify("a.wav")[0][0] in CLASSES
