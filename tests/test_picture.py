"""demo/picture.py: README's picture from run folders."""

import sys

import pytest
from PIL import Image

import demo.picture


def test_a_run_is_drawn(plain, tmp_path, monkeypatch):
    output = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["picture", str(plain), str(plain), "--output", str(output)])
    demo.picture.main()
    page = Image.open(output).convert("RGB")
    assert page.size == (demo.picture.WIDTH, demo.picture.MARGIN + 2 * demo.picture.PANEL)
    assert len(page.getcolors(2**24)) > 100, "no drawing of a flower on it"


def test_the_examples_are_the_first_of_their_classes_that_were_wrong(plain):
    run = demo.picture.DemoRun(plain)
    classes, wrong = set(), []
    for before, _ in run.pairs:
        if before["rewards"]["accuracy"] < 1 and before["truth"] not in classes:
            classes.add(before["truth"])
            wrong.append(before["row"])
    assert wrong and [row.index for row, _, _ in run.examples()] == wrong[: demo.picture.SHOWN]


def test_another_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["picture", str(tmp_path)])
    for said in ("not the folder of a run", "a run without held-out evaluations before and after"):
        with pytest.raises(SystemExit, match="2"):
            demo.picture.main()
        assert said in capsys.readouterr().err
        (tmp_path / "config.yaml").write_text("seed: 0")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
