"""An image that vanishes or breaks while a run goes on: named, and what was trained is kept."""

import re

import pytest

import data.rows
import grpo.run.run
import train_cls
from data.errors import ImageFault, UserError
from data.flowers import rows
from data.images import open_image
from data.rows import Row
from grpo.engine.ranks import Ranks
from grpo.run import exits
from grpo.run.exits import USER_ERROR
from tests import forked
from tests.runs import CHECKPOINT, SHORT, read_lines, timeless, train


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """Class folders of photographs, and arguments for them."""
    folder = tmp_path_factory.mktemp("flowers") / "set"
    for number, row in enumerate(rows("train", 24)):
        of_class = folder / re.sub("</?answer>", "", row["solution"])
        of_class.mkdir(parents=True, exist_ok=True)
        row["image"].save(of_class / f"{number}.png")
    argv = ["--model_name_or_path", str(CHECKPOINT), "--dataset_name", str(folder)]
    return folder, [*argv, *SHORT, "--max_steps", "3", "--learning_rate", "1e-4"]


@pytest.fixture(scope="module")
def whole(flowers, tmp_path_factory):
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("never stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.run.run, "write_report", lambda folder: "")
        train(run, *flowers[1])
    return run


@pytest.fixture(autouse=True)
def no_pauses(request, monkeypatch):
    if "flowers" in request.fixturenames:
        monkeypatch.setattr(data.rows, "PAUSES", (0.0, 0.0))


def when_in(phase: str, act, monkeypatch) -> None:
    """Calls act() when a run in this process enters the phase for the first time."""
    enter, left = Ranks.enter, [phase]

    def watched(self, name: str) -> None:
        enter(self, name)
        if left == [name]:
            left.clear()
            act()

    monkeypatch.setattr(Ranks, "enter", watched)


@pytest.mark.parametrize("images", [1, 2])
def test_a_third_try_may_succeed(tmp_path, monkeypatch, images):
    paths = tuple(tmp_path / f"{number}.png" for number in range(images))
    for path in paths:
        rows("train", 1)[0]["image"].save(path)
    row, pauses = Row(7, paths, "?", "!"), []
    keys = row.image_keys
    paths[-1].rename(tmp_path / "away")

    def back(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            (tmp_path / "away").rename(paths[-1])

    monkeypatch.setattr(data.rows.time, "sleep", back)
    opened = row.opened(paths)
    assert tuple(key for key, _ in opened) == keys and pauses == list(data.rows.PAUSES)
    for (_, image), path in zip(opened, paths, strict=True):
        assert image.tobytes() == open_image(path).tobytes()
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    with pytest.raises(ImageFault, match=r"^row 7 \(.*0\.png.*\): .*(corrupt|Pillow)"):
        assert row.size


@pytest.mark.slow
@pytest.mark.parametrize("phase, step", [("rollout of step 2", 1), ("evaluation of step 3", 3)])
def test_an_image_that_vanishes_is_named_and_the_run_is_kept(
    tmp_path, flowers, whole, monkeypatch, capsys, phase, step
):
    """Back in its place, the run goes on and ends as one that was never stopped."""
    (pictures, argv), run, away = flowers, tmp_path / "run", tmp_path / "away"
    with monkeypatch.context() as patch:
        when_in(phase, lambda: pictures.rename(away), patch)
        with pytest.raises(ImageFault, match=r"row \d+ \(.*\.png\): .* missing: .*put the file"):
            train(run, *argv)
    said = f"ended after step {step} of 3; continue with --output_dir {run} --resume_from_check"
    assert said in capsys.readouterr().out
    assert (run / f"checkpoint-{step}").is_dir() and not (run / "final").exists()
    away.rename(pictures)
    train(run, "--resume_from_checkpoint", "auto")
    lines = [timeless(read_lines(folder / "metrics.jsonl")) for folder in (run, whole)]
    for key in lines[0][-1]:  # an evaluation that is made up for counts the steps in no other way
        assert lines[0][-1][key] == lines[1][-1][key], key
    assert lines[0] == lines[1]
    weights = [folder / "final" / "model.safetensors" for folder in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def blind(argv: list[str]) -> None:
    """A run whose rank 1 cannot read an image from step 2 on."""
    data.rows.PAUSES, true, enter = (0.0, 0.0), data.rows.open_image, Ranks.enter
    seen = []

    def watched(self, phase: str) -> None:
        enter(self, phase)
        if self.rank == 1 and phase == "rollout of step 2":
            seen.append(phase)

    def broken(source):
        if seen:
            raise UserError("corrupt or truncated")
        return true(source)

    Ranks.enter, data.rows.open_image = watched, broken
    exits.sys.argv[1:] = argv
    exits.run_and_exit(train_cls.main)


@pytest.mark.slow
def test_an_image_that_one_of_two_ranks_cannot_read(tmp_path, flowers):
    run = tmp_path / "run"
    out = forked.ranks(2, tmp_path, blind, ["--output_dir", str(run), *flowers[1]])
    assert out.codes == [USER_ERROR] * 2, out.stderr[-3000:]
    assert out.stderr.count("cannot be read now: corrupt or truncated; put the file") == 1
    assert "Traceback" not in out.stderr
    assert "ended after step 1 of 3; continue with" in out.stdout
    assert (run / "checkpoint-1").is_dir()
