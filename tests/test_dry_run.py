"""What a dry run looks at besides; text that a terminal cannot show; a report's damaged files."""

import io
import json
import os
import shutil
import sys

import pytest

import train_cls
from data import files
from data.errors import UserError
from data.flowers import rows
from grpo.report.__main__ import write
from grpo.report.read import Completions, read_run
from grpo.run import dry, exits
from grpo.run.folder import RunFolder, _drop_findings_after
from tests.runs import CHECKPOINT, SHORT

pytestmark = pytest.mark.slow
DRY = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", "demo:flowers", *SHORT]
DRY += ["--dry_run"]


def test_it_looks_at_the_checkpoint_to_resume_from(tmp_path, plain, capsys):
    run = shutil.copytree(plain, tmp_path / "run")
    again = ["--output_dir", str(run), "--resume_from_checkpoint"]
    argv = ["--dry_run", *SHORT]
    with pytest.raises(UserError, match="no state.json there, so it is not a checkpoint"):
        train_cls.main([*DRY, "--resume_from_checkpoint", str(tmp_path / "checkpoint-7")])
    with pytest.raises(UserError, match="has ended and kept no checkpoint"):
        train_cls.main([*argv, *again, "auto"])
    assert train_cls.main([*DRY, *again[:1], str(tmp_path / "new"), again[2], "auto"]) == 0
    assert "new has no checkpoint to resume from yet" in capsys.readouterr().out
    shutil.rmtree(run)
    stop = ["--output_dir", str(run), *SHORT, "--save_steps", "1"]
    assert train_cls.main(stop) == 0
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-2")
    assert train_cls.main([*argv, *again, "auto"]) == 0
    assert f"resumes   {run / 'checkpoint-1'}, step 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="--seed: 0 then, 5 now"):
        train_cls.main([*argv, *again, "auto", "--seed", "5"])
    (run / "checkpoint-1" / "optimizer" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no whole checkpoint to resume from(.|\n)*optimizer"):
        train_cls.main([*argv, *again, "auto"])


def test_it_says_where_weights_are_too_large_to_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dry, "LARGEST", 1000)
    monkeypatch.setattr(dry, "check_finite", lambda folder: pytest.fail("they were read"))
    assert train_cls.main([*DRY, "--output_dir", str(tmp_path / "run")]) == 0
    assert "GB of weights were not read; a run refuses NaN in them" in capsys.readouterr().out


def test_it_looks_at_the_aliases(tmp_path, capsys):
    path, argv = tmp_path / "aliases.json", [*DRY, "--output_dir", str(tmp_path / "run")]
    path.write_text(json.dumps({"corn poppy": ["Papaver rhoeas"], "rose": ["Rosa"]}))
    assert train_cls.main([*argv, "--aliases", str(path)]) == 0
    assert "--aliases: no class of the data set is rose" in capsys.readouterr().out
    path.write_text(json.dumps({"corn poppy": ["sunflower"]}))
    with pytest.raises(UserError, match="'sunflower', an alias of 'corn poppy', is a class too"):
        train_cls.main([*argv, "--aliases", str(path)])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"aliases.json: not a regular file but a pipe"):
        train_cls.main([*argv, "--aliases", str(path)])


HOSTILE = ["</script><script>alert(1)</script>", "a\nb", "x/y\\z", "y" * 990, "\u202e\u05e9\u05dc"]
HOSTILE += [
    "a {{7*7}} {% raw %}",
    "<img src=x onerror=alert(2)>",
    "a\0b",
    "\U0001f33b \xfcn",
    "%s {0}",
]
HOSTILE += ["| a | b |", "--flag", "\ud800 lone", "]]>"]


def ascii_terminal(monkeypatch) -> dict[str, io.TextIOWrapper]:
    """From here on stdout and stderr that raise for what ASCII lacks, as a terminal's may."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), "ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    return streams


def printed(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("ascii")


def test_class_names_of_any_text_reach_files_report_and_trackers(tmp_path, monkeypatch):
    table = []
    for number, (name, row) in enumerate(zip(HOSTILE, rows("train", len(HOSTILE)), strict=True)):
        row["image"].save(tmp_path / f"{number}.png")
        solution = f"<answer>{name}</answer>"
        table.append({"image": f"{number}.png", "problem": "What is it?", "solution": solution})
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(table))
    run = tmp_path / "run"
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(tmp_path), *SHORT]
    argv += ["--output_dir", str(run), "--prompts_per_step", str(len(HOSTILE)), "--max_steps", "1"]
    argv += ["--diagnose_after", "1", "--report_to", "tensorboard", "--num_generations", "2"]
    argv += ["--max_completion_length", "4"]
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    with monkeypatch.context() as patch:
        streams = ascii_terminal(patch)
        with pytest.raises(SystemExit) as ended:
            exits.run_and_exit(train_cls.main)
    assert ended.value.code == 0, printed(streams["stderr"])
    assert "diagnosis: accuracy has been 0" in printed(streams["stdout"])
    page = write([run], None).read_text()
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page and "<img src=x" not in page
    truths = {json.loads(line)["truth"] for line in (run / "completions.jsonl").open()}
    assert truths == set(HOSTILE)


def test_what_no_encoding_has_is_printed_escaped(monkeypatch):
    def main(argv):
        print("\u2192")
        raise UserError("\ud800 \xfc \U0001f33b")

    with monkeypatch.context() as patch:
        streams = ascii_terminal(patch)
        with pytest.raises(SystemExit, match="2"):
            exits.run_and_exit(main)
    assert printed(streams["stdout"]) == "\\u2192\n"
    assert printed(streams["stderr"]) == "error: \\ud800 \\xfc \\U0001f33b\n"


def test_findings_are_written_and_read_in_utf_8(tmp_path):
    class Folder:
        path, _naming_the_disk = tmp_path, RunFolder._naming_the_disk

    for step in (1, 2):
        RunFolder.write_findings(Folder(), step, {"flat": "truth \u05e9 \ud800"})
    text = "step 1: truth \u05e9 \\ud800\n\n"
    file = tmp_path / "diagnosis.txt"
    _drop_findings_after(file, 1)
    assert file.read_bytes() == text.encode()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.json", "diagnosis.txt"])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_report_of_a_folder_with_odd_files_is_refused(tmp_path, plain, name, what):
    run = shutil.copytree(plain, tmp_path / "run", ignore=lambda *_: [name])
    os.mkfifo(run / name) if what == "pipe" else (run / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name}: not a regular file but a {what}"):
        read_run(run)


def test_a_report_of_damaged_files_is_refused(tmp_path, plain):
    run = shutil.copytree(plain, tmp_path / "run")
    (run / "config.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(UserError, match="config.yaml: cannot be read") as caught:
        read_run(run)
    assert len(str(caught.value)) < 500
    (run / "completions.jsonl").unlink()
    os.mkfifo(run / "completions.jsonl")
    with pytest.raises(UserError, match="completions.jsonl: not a regular file but a pipe"):
        Completions(run / "completions.jsonl")
    assert files.impossible(tmp_path) == ""
