"""report.html of a run's folder: reads what the run wrote, and nothing of the run itself.

No torch here: `python -m grpo.report` starts in a fraction of a second, during a run or after it.
"""
