"""New tasks begun from deltas of other tasks (Lv et al. 2023), each task held out in turn.

config.py   the options, and the runs that they come to
sources.py  finished runs of eval.finetune, one a task
scores.py   the five scores of a source on the examples of a new task
starts.py   scores to weights to deltas to begin from
work.py     one held-out task with one seed: heads, scores, starts, tuning
report.py   JSON and Markdown
"""
