"""A run's report, or several runs side by side, as one HTML file that opens without a network.

python -m grpo.report RUN                    RUN/report.html
python -m grpo.report RUN RUN [RUN ...]      comparison.html, in the folder you are in
"""

import argparse
import os
import sys
from pathlib import Path

from data.errors import UserError
from grpo.report.page import comparison_page, run_page
from grpo.report.read import read_run


def write(folders: list[Path], output: Path | None) -> Path:
    """Writes the report of one run, or the comparison of several; never half a page.

    output: the path; None for report.html in the run's folder, or comparison.html in the current
    one. Returns the path. Raises UserError if a folder is no run's or is damaged, or the page
    cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    page = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    if output is None:
        output = folders[0] / "report.html" if len(runs) == 1 else Path("comparison.html")
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page to write; by default report.html in the run's folder, and for several runs "
        "comparison.html in the current one",
    )
    arguments = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")
    # A report fetches nothing: a data set of the hub is read from what the run left on the disk.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        print(write(arguments.runs, arguments.output))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
