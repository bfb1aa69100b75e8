"""grpo/report: what it reads, what it samples, and the page in a real browser."""

import fcntl
import html.parser
import json
import random
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

import grpo.run.run
from data.load import load
from grpo.report import __main__ as command
from grpo.report.page import run_page, visible
from grpo.report.pictures import Picture, draw
from grpo.report.read import Completions, read_run
from grpo.report.sample import POINTS, evenly, extremes, pick_groups, rank_rows, trailing_mean
from grpo.run import reporter
from models.processor import Processor
from rewards.frames import FRAMES, Frames, frame_of
from tests import runs
from tests.runs import CHECKPOINT, ROOT, read_steps

pytestmark = pytest.mark.slow

# What a model could write to run in the page, to break it, or to be no UTF-8.
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "</pre></article></main><script>alert(2)</script>",
    '"><svg onload=alert(3)>',
    "' onmouseover='alert(4)",
    "{{ 7 * 7 }} {% raw %}",
    "\u2028alert(5)\u2029",
    "lone \ud800 and \udfff",
    "nul \x00 bell \x07 escape \x1b[31m",
    "turned \u202e round",
    "<a href='javascript:alert(6)'>here</a>",
    "]]>&lt;b&gt;",
)


def made_run(folder: Path, texts=("an answer",), steps: int = 3, group: int = 4, **config) -> Path:
    """A run's folder with made-up numbers: two rows, an evaluation at both ends, one dead group a
    step. texts: what everything says, in turns."""
    folder.mkdir(parents=True)
    config = {"dataset_name": "nowhere/data.json", "max_steps": steps, "seed": 1, **config}
    config |= {"reward_weights": [1.0, 0.5], "bf16": True}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "run.json").write_text(json.dumps({"steps": steps, "frames": None}))

    def record(row: int, value: float) -> dict:
        text = texts[(row + int(10 * value)) % len(texts)]
        rewards, reasons = {"accuracy": value, "format": 1.0}, {"accuracy": text}
        return {"row": row, "truth": text, "answer": text, "completion": text,
                "rewards": rewards, "reasons": reasons, "reward": 1 + value, "tokens": 9,
                "truncated": False}  # fmt: skip

    metrics, completions = [{"step": 0, "eval/accuracy": 0.25, "eval/format": 1.0}], []
    for step in range(1, steps + 1):
        line = {"step": step, "reward": 1 + step / steps, "rewards/accuracy/mean": step / steps}
        metrics.append(line | {"kl": 0.1 * step, "grad_norm": None if step == 2 else 1.5})
        for prompt in (0, 1):  # the second group is dead
            for sample in range(group):
                value = 0.1 * sample if prompt == 0 else 0.5
                place = {"step": step, "prompt": prompt, "sample": sample}
                more = {"advantage": sample - (group - 1) / 2 if prompt == 0 else 0.0}
                completions.append(place | record(prompt, value) | more)
    metrics.append({"step": steps, "eval/accuracy": 0.75, "eval/format": 1.0})
    evaluated = {0: [record(0, 0.0), record(1, 0.5)], steps: [record(0, 1.0), record(1, 0.5)]}
    files = {"metrics.jsonl": metrics, "completions.jsonl": completions}
    files |= {f"eval-{step}.jsonl": records for step, records in evaluated.items()}
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def cut(path: Path, letters: int = 9) -> None:
    """The file as a kill in the middle of its last line leaves it."""
    path.write_bytes(path.read_bytes()[:-letters])


# ---- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "wanted"), [(5, 9), (9, 9), (100, 7), (1000, 24), (10, 9)])
def test_evenly(count, wanted):
    chosen = evenly(count, wanted)
    assert len(chosen) == min(count, wanted)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert max(gaps) - min(gaps) <= 1 and min(gaps) >= 1


def test_a_sampled_curve_keeps_its_spikes():
    chance = random.Random(0)
    values = [chance.random() for _ in range(12_345)]
    values[6_001], values[9_999], values[3_000] = 50.0, -50.0, None
    kept = extremes(values)
    assert len(kept) <= POINTS and kept == sorted(set(kept))
    assert {0, 6_001, 9_999, 12_344} <= set(kept) and 3_000 not in kept
    assert max(b - a for a, b in pairwise(kept)) < 100, "a stretch without a value"
    assert extremes([1.0] * POINTS) == list(range(POINTS))
    assert extremes([None] * 5_000) == [0, 4_999]


def test_the_moving_mean_is_that_of_the_last_steps():
    chance = random.Random(1)
    values = [chance.choice([None, chance.random()]) for _ in range(200)]
    for place, mean in enumerate(trailing_mean(values, 7)):
        window = [v for v in values[max(0, place - 6) : place + 1] if v is not None]
        assert mean == (pytest.approx(np.mean(window)) if window else None)


def test_groups_are_picked_evenly_over_the_run():
    places = [(step, prompt) for step in range(1, 301) for prompt in range(8)]
    picked = pick_groups(places, 24)
    steps = [step for step, _ in picked]
    assert len(set(steps)) == 24 and (steps[0], steps[-1]) == (1, 300)
    assert {b - a for a, b in pairwise(steps)} == {13}
    assert {prompt for _, prompt in picked} == set(range(8)), "not the first of each step alone"
    few = pick_groups([(1, 0), (1, 1), (7, 0), (7, 1), (7, 2)], 4)
    assert few == [(1, 0), (1, 1), (7, 1), (7, 2)]
    assert pick_groups([], 4) == []


def test_rows_come_worst_and_most_changed_first():
    before = {1: 0.9, 2: 0.0, 3: 0.5, 4: 0.2}
    after = {1: 0.1, 2: 1.0, 3: 0.5, 4: 0.0}
    # worst: 4, 1, 3, 2; most changed: 2 (+1), 1 (-0.8), 4 (-0.2), 3
    assert rank_rows(before, after) == [4, 2, 1, 3]
    assert rank_rows({}, {5: 1.0, 3: 0.0}) == [3, 5]


# ---- reading ------------------------------------------------------------------------------------


def test_a_run_is_read(tmp_path):
    folder = made_run(tmp_path / "run", steps=3)
    (folder / "diagnosis.txt").write_text("step 2: flat\n  more\n\nstep 3: again\n\n")
    run = read_run(folder)
    assert [line["step"] for line in run.training] == [1, 2, 3] and run.steps == run.step == 3
    assert [line["step"] for line in run.evaluations] == [0, 3]
    assert run.findings == [(2, "flat\n  more"), (3, "again")]
    (first, before), (last, after) = run.answers()
    assert (first, last) == (0, 3) and before["", 0]["rewards"]["accuracy"] == 0
    assert after["", 0]["rewards"]["accuracy"] == 1
    assert run.status == "stopped"
    with (folder / ".lock").open("a+") as lock:  # as a run that lives
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_run(folder).status == "running"
    (folder / "final").mkdir()
    assert read_run(folder).status == "finished"


def test_a_run_in_progress_is_read(tmp_path):
    """The last lines are being written, or nothing is there yet."""
    folder = made_run(tmp_path / "run", steps=3)
    for name in ("metrics.jsonl", "completions.jsonl", "eval-3.jsonl"):
        cut(folder / name)
    run = read_run(folder)
    assert [line["step"] for line in run.evaluations] == [0] and run.step == 3
    assert Completions(folder / "completions.jsonl").group(3, 1)[-1]["sample"] == 2
    assert "3 of 3 steps" in run_page(run)
    for name in ("metrics.jsonl", "completions.jsonl"):
        (folder / name).write_text("")
    assert "No step is finished yet" in run_page(read_run(folder))


def test_completions_are_found_by_group(tmp_path):
    folder = made_run(tmp_path / "run", steps=4)
    completions = Completions(folder / "completions.jsonl")
    every = runs.read_lines(folder / "completions.jsonl")
    assert completions.groups == [(step, prompt) for step in (1, 2, 3, 4) for prompt in (0, 1)]
    for group in completions.groups:
        wanted = [line for line in every if (line["step"], line["prompt"]) == group]
        assert completions.group(*group) == wanted and len(wanted) == 4


def replaced(name: str, line: bytes, number: int = 3):
    """f(run) that spoils a line of its file."""
    return lambda run: spoil(run / name, line, number)


GROUP = b'{"step": 1, "prompt": 0, "sample": 2, \n'
LIST = b'{"row": 0, "truth": "", "answer": null, "completion": "", "rewards": [], "reward": 1, '
DAMAGE = {
    "no folder": (lambda run: shutil.rmtree(run), "no such folder"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "no config.yaml"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl"),
    "no YAML": (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml: cannot be"),
    "a list": (lambda run: (run / "config.yaml").write_text("- 1"), "holds no `flag: value`"),
    "binary": (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
    "metrics": (replaced("metrics.jsonl", b"}{\n"), "metrics.jsonl, line 3: damaged"),
    "a number": (replaced("metrics.jsonl", b"17\n"), "metrics.jsonl, line 3: damaged"),
    "a step": (replaced("metrics.jsonl", b'{"step": "x"}\n'), "step is 'x'"),
    "completions": (replaced("completions.jsonl", b"x\n"), "line 3: damaged"),
    "a group": (replaced("completions.jsonl", GROUP), "completions.jsonl, step 1, prompt 0"),
    "answers": (replaced("eval-3.jsonl", b"[]\n", 1), "eval-3.jsonl, line 1"),
    "rewards": (replaced("eval-3.jsonl", LIST + b'"tokens": 1}\n', 1), "rewards is"),
    "frames": (lambda run: (run / "run.json").write_text('{"frames": 3}'), "run.json: damaged"),
    "run.json": (lambda run: (run / "run.json").write_text("{"), "run.json: not JSON"),
}


def spoil(path: Path, line: bytes, number: int = 3) -> None:
    """Puts another line in the place of line `number`."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_ends_in_one_message(name, tmp_path, monkeypatch, capsys):
    folder = made_run(tmp_path / "run")
    DAMAGE[name][0](folder)
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    said = capsys.readouterr()
    assert DAMAGE[name][1] in said.err and said.err.startswith("error: ") and not said.out
    assert said.err.count("error: ") == 1 and "Traceback" not in said.err
    assert not (folder / "report.html").exists()


def test_no_torch_is_imported():
    """A run waits for its report, which must start at once."""
    code = "import sys, grpo.report.__main__; print({'torch', 'datasets'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# ---- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", FRAMES)
def test_the_frame_that_was_written_down_is_the_runs(answers):
    processor = Processor(CHECKPOINT, max_pixels=100 * 28 * 28)
    frames = Frames("thousandths", answers, processor.answers_in, processor.resized)
    rows = load("demo:scenes", "test").first(3)
    described = json.loads(json.dumps(frames.described(row.size for row in rows)))
    for row in rows:
        assert frame_of(described, row.size) == frames.answer(row)
    assert (frame_of(described, (12, 34)) is None) == (answers == "resized")
    assert frame_of({}, (12, 34)) is None


def test_boxes_are_drawn_where_they_are():
    """An image of 640 x 480 pixels, shown at 320 x 240."""
    picture = Picture("", 320, 240, (640, 480))
    frames = {"answers": "thousandths", "resized": {}}
    text = "[{'Position': [250, 500, 750, 1000], 'Confidence': 0.8}]"
    (box,) = draw("after", text, picture, frames, None)
    assert (box.x, box.y, box.width, box.height, box.label) == (80, 120, 160, 120, "0.80")
    (box,) = draw("truth", "(64,48),(128,480)", picture, {"answers": "pixels"}, "")
    assert (box.x, box.y, box.width, box.height, box.label) == (32, 24, 32, 216, "")
    resized = {"answers": "resized", "resized": {"640x480": [1280, 960]}}
    (box,) = draw("truth", "(128,96),(256,960)", picture, resized, "")
    assert (box.x, box.y, box.width, box.height) == (32, 24, 32, 216)
    for nothing in ("No Objects", None, "a poppy", "(9,9),(1,1)"):
        assert draw("after", nothing, picture, frames, None) == []
    assert draw("after", text, None, frames, None) == draw("after", text, picture, None, None) == []


def test_a_data_set_that_is_gone_leaves_a_report_without_images(tmp_path):
    folder = made_run(tmp_path / "run", dataset_name=str(tmp_path / "photos"))
    page = run_page(read_run(folder))
    assert "no images and problems: the data set cannot be read now" in page
    assert (
        'src="data:' not in page.replace(get_plotlyjs(), "")
        and page.count('class="no-picture"') == 2 + 6
    )
    row = {"problem": "What?", "solution": "<answer>a</answer>"}
    rows = [{"images": ["a.png", "b.png"], **row}]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "b.png").write_bytes(b"another")
    for split in ("train", "test"):
        (tmp_path / "photos" / f"{split}.json").write_text(json.dumps(rows))
    page = run_page(read_run(folder))  # there again, with fewer rows and without an image
    assert "an image is missing: row 0" in page and "rows are missing" in page


# ---- the page -----------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def hostile_run(folder: Path) -> Path:
    """Everything that a model, a data set or an edited reward writes is hostile."""
    photos = folder.with_name(f"{folder.name}-photos")
    photos.mkdir()
    Image.new("RGB", (40, 30), "red").save(photos / "a.png")
    rows = [{"image": "a.png", "problem": text, "solution": text} for text in HOSTILE[:2]]
    for split in ("train", "test"):
        (photos / f"{split}.json").write_text(json.dumps(rows))
    run = made_run(folder, HOSTILE, 6, len(HOSTILE), dataset_name=str(photos), run_name=HOSTILE[0])
    (run / "diagnosis.txt").write_text("".join(f"step 2: {text!a}\n\n" for text in HOSTILE))
    lines = runs.read_lines(run / "metrics.jsonl")
    for line in lines:  # names: of categories and of terms
        if "eval/accuracy" in line:
            line |= {f"eval/AP50/{HOSTILE[0]}": 0.5, f"eval/{HOSTILE[0]}": 0.5}
        else:
            line[f"rewards/{HOSTILE[0]}/mean"] = line[f"rewards/{HOSTILE[2]}/mean"] = 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_nothing_a_model_wrote_is_markup(tmp_path):
    folder = hostile_run(tmp_path / "run")
    hostile = run_page(read_run(folder))
    hostile.encode("utf-8")
    ours = hostile.replace(get_plotlyjs(), "")
    assert not re.search("[\x00-\x08\x0b-\x1f\u2028-\u202e\ud800-\udfff]", ours)
    page, peaceful = Elements(hostile), Elements(run_page(read_run(made_run(tmp_path / "calm"))))
    assert len(page.named("script")) == len(peaceful.named("script")) == 3
    for name, attributes in page.found:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;")
        assert name != "svg" or attributes.keys() == {"viewbox", "aria-hidden"}
    assert {name for name, _ in page.found} <= {name for name, _ in peaceful.found} | {
        "img", "ol", "h4", "em", "svg", "g", "rect", "text", "li", "pre",
    }  # fmt: skip
    (policy,) = [m for m in page.named("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy["content"] and "unsafe-inline' " not in policy["content"]


def test_invisible_characters_are_shown_as_escapes():
    assert visible("a\x00b\ud800c\u2028d\u202ee\tf\n") == "a\\x00b\\ud800c\\u2028d\\u202ee\tf\n"
    assert visible("blåbær 花 🌼") == "blåbær 花 🌼" and visible(None) == "" and visible(3) == 3


def test_a_long_run_has_a_small_report_that_says_what_it_leaves_out(tmp_path):
    """20,000 steps, photographs that do not compress, groups of 64 long completions."""
    photos, chance = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(80):
        noise = chance.integers(0, 255, (700, 700, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{number}.jpg", quality=50)
    rows = [{"image": f"{i}.jpg", "problem": "What is it?" * 9, "solution": "a"} for i in range(80)]
    for split in ("train", "test"):
        (photos / f"{split}.json").write_text(json.dumps(rows))
    long = " ".join(["thought"] * 700)
    folder = made_run(tmp_path / "run", [long], 30, 64, dataset_name=str(photos))
    names = [f"time/phase{i}_s" for i in range(8)] + ["kl", "entropy", "reward", "grad_norm"]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(20_000):
            line = {name: chance.random() for name in names}
            file.write(json.dumps({"step": step + 1, **line}) + "\n")
        file.write('{"step": 30, "eval/accuracy": 0.5}\n')
    record = json.loads((folder / "eval-30.jsonl").read_text().splitlines()[0])
    lines = [json.dumps(record | {"row": row}) + "\n" for row in range(80)]
    (folder / "eval-30.jsonl").write_text("".join(lines))
    page = run_page(read_run(folder))
    assert len(page.encode()) < 10_000_000
    assert "60 of 80 rows, a sample" in page and "24 of 60 groups, a sample" in page
    assert "The first 16 of 64 completions" in page and "more characters)" in page
    assert "Of 20,000 values the lowest and the highest" in page
    assert "some images are left out, to keep this file small" in page


def test_several_runs_stand_side_by_side(tmp_path, monkeypatch, capsys):
    one = made_run(tmp_path / "one", steps=3, learning_rate=1e-6)
    two = made_run(tmp_path / "two", steps=5, learning_rate=2e-6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(one), str(two)])
    command.main()
    assert capsys.readouterr().out.strip() == "comparison.html"
    page = (tmp_path / "comparison.html").read_text()
    found = re.search(r'id="charts-data">(.*?)</script>', page)
    charts = {chart["title"]: chart["lines"] for chart in json.loads(found[1])}
    assert [line["name"] for line in charts["reward"]] == ["one", "two"]
    assert charts["reward"][1]["y"] == pytest.approx([1.2, 1.4, 1.6, 1.8, 2.0])
    assert charts["eval/accuracy"][0]["x"] == [0, 3]
    assert re.search(r'class="differs"><th scope="row">learning_rate', page)
    assert not re.search(r'class="differs"><th scope="row">seed', page)
    assert re.search(r'row">reward_weights</th><td>1.0 0.5</td>', page)
    assert re.search(r'row">bf16</th><td>true</td>', page)
    monkeypatch.setattr(sys, "argv", ["report", str(one), str(one), "--output", "both.html"])
    command.main()
    assert (tmp_path / "both.html").is_file(), "runs of one name are told apart by their folders"


# ---- of a run -----------------------------------------------------------------------------------


def test_a_report_is_written_or_there_is_a_note(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    why = f"error: {folder}: no such folder; try python -m grpo.report {folder}"
    assert reporter.write_report(folder) == f"note: report.html was not written: {why}"
    monkeypatch.chdir(made_run(folder))
    (folder / "plotly").mkdir()
    (folder / "plotly" / "__init__.py").write_text("1 / 0")  # stands in for nothing
    assert reporter.write_report(folder) == ""
    assert (folder / "report.html").stat().st_size > 1e6
    with monkeypatch.context() as patch:
        patch.setattr(reporter, "LONGEST", 0.01)
        assert "not done after 0.01 seconds" in reporter.write_report(folder)
    for program, why in (("/none/python", "No such file"), ("/bin/false", "exit code 1")):
        monkeypatch.setattr(sys, "executable", program)
        assert why in reporter.write_report(folder)


def test_a_run_has_its_report_after_each_evaluation_and_ends_without_one(
    tmp_path, monkeypatch, capsys
):
    """What the folder says when a report is asked for; none can be written."""
    asked = []

    def fail(folder: Path) -> str:
        run = read_run(folder)
        asked.append((run.status, run.step, run.evaluations[-1]["step"], len(run.answers())))
        return f"note: {len(asked)}"

    monkeypatch.setattr(grpo.run.run, "write_report", fail)
    runs.train(tmp_path / "run", *runs.SHORT, "--max_steps", "5", "--eval_steps", "2")
    assert asked == [("running", 2, 2, 2), ("running", 4, 4, 2), ("finished", 5, 5, 2)]
    said = capsys.readouterr().out
    assert all(f"note: {number}" in said for number in (1, 2, 3)) and "report  " not in said


def test_the_runs_wrote_their_reports(plain, boxes):
    """As the fixtures left them."""
    for folder, steps in ((plain, 2), (boxes, 12)):
        page = (folder / "report.html").read_text()
        assert f"{steps} of {steps} steps" in page and ">finished</span>" in page
        assert 'src="data:image/jpeg' in page and 'class="no-picture"' not in page
    assert read_run(boxes).frames == {"answers": "thousandths", "resized": {}}


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium that reaches no network; skips where it or its driver is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("neither chromium nor google-chrome with chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu",
                 "host-resolver-rules=MAP * ~NOTFOUND"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")  # an alert is to be seen
    service = webdriver.ChromeService(driver)
    window = webdriver.Chrome(options=options, service=service)
    window.set_window_size(1280, 1000)
    network = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    window.execute_cdp_cmd("Network.enable", {})
    window.execute_cdp_cmd("Network.emulateNetworkConditions", network)
    yield window
    window.quit()


OPEN_ALL = "document.querySelectorAll('details').forEach((part) => { part.open = true; })"


def opened(browser, page: Path):
    """The page, drawn, without an error in the console and without a request."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page.as_uri())
    drawn = "return [...document.querySelectorAll('.chart')].every(c => c.querySelector('.xy'))"
    WebDriverWait(browser, 30).until(lambda window: window.execute_script(drawn))
    assert browser.get_log("browser") == []
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in fetched if not name.startswith("data:")] == []
    return browser


def found(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def press(browser, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def hovered(browser, chart: str, step: int | None = None) -> tuple[int, dict[str, float]]:
    """The step and the values that a chart's hover label shows, once it shows `step` if given."""
    from selenium.webdriver.support.ui import WebDriverWait

    label = f"#chart-{chart} .hoverlayer"
    wanted = "step" if step is None else f"step {step}\n"
    WebDriverWait(browser, 5).until(lambda window: wanted in found(window, label)[0].text)
    title, *lines = found(browser, label)[0].text.splitlines()
    values = dict(line.rsplit(" : ", 1) for line in lines)
    return int(title.split()[1]), {name: float(value) for name, value in values.items()}


@pytest.mark.slow
def test_the_curves_tell_what_was_logged(browser, boxes):
    """At a step in the middle by the mouse, then step by step by the keyboard."""
    from selenium.webdriver import ActionChains, Keys

    opened(browser, boxes / "report.html")
    steps = {line["step"]: line for line in read_steps(boxes)}
    ActionChains(browser).move_to_element(found(browser, "#chart-reward .nsewdrag")[0]).perform()
    step, values = hovered(browser, "reward")
    assert 5 <= step <= 7 and values["reward"] == pytest.approx(steps[step]["reward"], rel=1e-3)
    there, values = hovered(browser, "terms")  # the cursor is common
    assert there == step and values.keys() == {"iou", "confidence", "format"}
    for name, value in values.items():
        assert value == pytest.approx(steps[step][f"rewards/{name}/mean"], rel=1e-3, abs=1e-6)
    there, values = hovered(browser, "grad-norm")
    expected = steps[step]["grad_norm"]
    assert there == step and values["grad_norm"] == pytest.approx(expected, rel=1e-3)

    away = ActionChains(browser)
    away.w3c_actions.pointer_action.move_to_location(1, 1)
    away.perform()
    browser.execute_script("document.getElementById('charts').focus()")
    press(browser, Keys.HOME, *4 * [Keys.ARROW_RIGHT])  # from step 0
    _, values = hovered(browser, "kl", 4)
    assert values["kl"] == pytest.approx(steps[4]["kl"], rel=1e-3)
    said = found(browser, "#reading")[0].text
    assert said.startswith("step 4: ") and f"Reward {steps[4]['reward']:.4g}" in said
    press(browser, Keys.END)
    _, values = hovered(browser, "held-out", 12)
    assert values["AP50"] == pytest.approx(steps[12]["eval/AP50"], rel=1e-3)


@pytest.mark.slow
def test_the_gallery_is_filtered(browser, boxes):
    from selenium.webdriver.support.ui import Select

    opened(browser, boxes / "report.html")
    rows = load("demo:scenes", "test")
    before, after = (runs.read_lines(boxes / f"eval-{step}.jsonl") for step in (0, 12))
    evaluations = (before, after)
    right = [{line["row"]: line["rewards"]["iou"] > 0.5 for line in e} for e in evaluations]
    shown = [int(re.search(r"\d+", card.text)[0]) for card in found(browser, ".card h3")]
    assert len(shown) == len(set(shown)) == 60
    assert after[shown[0]]["rewards"]["iou"] == min(line["rewards"]["iou"] for line in after)

    def numbers() -> set[int]:
        cards = [card for card in found(browser, ".card") if card.is_displayed()]
        assert found(browser, "#shown")[0].text == f"{len(cards)} shown"
        return {int(re.search(r"\d+", card.text)[0]) for card in cards}

    def choose(menu: str, name: str) -> set[int]:
        Select(found(browser, menu)[0]).select_by_visible_text(name)
        return numbers()

    assert choose("#by-verdict", "wrong") == {row for row in shown if not right[1][row]}
    became = {row for row in shown if right[1][row] and not right[0][row]}
    assert choose("#by-verdict", "became right") == became and became
    kites = {row for row in shown if "category 'kite'" in rows[row].problem}
    assert choose("#by-class", "kite") == became & kites
    assert choose("#by-verdict", "all") == kites and kites
    choose("#by-class", "all")
    Select(found(browser, "#by-order")[0]).select_by_visible_text("row")
    in_order = [int(re.search(r"\d+", card.text)[0]) for card in found(browser, ".card h3")]
    assert in_order == sorted(shown)
    card = found(browser, ".card")[0]
    true_boxes = rows[in_order[0]].solution.count("Position")
    assert len(card.find_elements("css selector", ".box.truth")) == true_boxes
    found(browser, "[data-kind=truth]")[0].click()
    boxes_drawn = (
        "[...document.querySelectorAll(arguments[0])].map((b) => b.getClientRects().length)"
    )
    assert set(browser.execute_script(f"return {boxes_drawn}", "#cards .box.truth rect")) == {0}
    assert set(browser.execute_script(f"return {boxes_drawn}", "#cards .box.after rect")) == {1}


@pytest.mark.slow
def test_everything_is_reached_by_the_keyboard(browser, plain):
    from selenium.webdriver import Keys

    opened(browser, plain / "report.html")
    names = []
    for _ in range(60):
        press(browser, Keys.TAB)
        active = browser.switch_to.active_element
        names.append(active.get_attribute("id") or active.tag_name)
        if active.tag_name == "summary" and active.text == "In full":
            press(browser, Keys.ENTER)
            break
    for name in ("a", "charts", "by-class", "by-verdict", "by-order", "summary"):
        assert name in names, names
    assert found(browser, ".card details[open] pre")[0].is_displayed()
    images = found(browser, "img") + found(browser, ".chart")
    texts = [image.get_attribute("alt") or image.get_attribute("aria-label") for image in images]
    assert len(texts) > 10 and all(texts)
    dead = found(browser, ".group[data-life=dead]")
    groups = Completions(plain / "completions.jsonl")
    equal = [len({line["reward"] for line in groups.group(*group)}) == 1 for group in groups.groups]
    assert len(dead) == sum(equal) and len(found(browser, ".group")) == len(equal)


@pytest.mark.slow
@pytest.mark.parametrize("pages", [1, 2], ids=["a run", "several"])
def test_hostile_text_is_shown_and_does_nothing(browser, tmp_path, pages):
    from selenium.common.exceptions import NoAlertPresentException

    folders = [hostile_run(tmp_path / f"run{number}") for number in range(pages)]
    output = command.write(folders, tmp_path / "page.html")
    opened(browser, output)
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.dismiss()
    assert not found(browser, "img[src=x]") and not found(browser, "svg[onload], [onerror]")
    assert found(browser, "h1")[0].text == (HOSTILE[0] if pages == 1 else "2 runs")
    assert all(figure.is_displayed() for figure in found(browser, "figure, #flags"))
    if pages == 1:
        browser.execute_script(OPEN_ALL)
        texts = [pre.text for pre in found(browser, ".samples pre")]
        for text in HOSTILE[:5]:
            assert text in texts
        assert r"lone \ud800 and \udfff" in texts and r"nul \x00 bell \x07 escape \x1b[31m" in texts
        press_on_links = "document.querySelectorAll('main a').forEach((a) => a.click())"
        browser.execute_script(press_on_links)
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_a_phone_needs_no_scrolling_sideways(browser, plain, boxes, tmp_path):
    both = command.write([plain, boxes], tmp_path / "comparison.html")
    screen = {"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        for page in (plain / "report.html", boxes / "report.html", both):
            opened(browser, page)
            browser.execute_script(
                "document.querySelectorAll('details').forEach(d => d.open = true)"
            )
            wide = "return document.documentElement.scrollWidth"
            assert browser.execute_script(wide) <= 360, page
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
