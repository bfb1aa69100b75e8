"""report.html, made from a run's folder and its data set alone.

No torch here: `python -m grpo.report` starts in a fraction of a second, during a run or after it.
"""
