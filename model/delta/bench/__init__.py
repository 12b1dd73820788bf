"""What an attached delta costs, against the frozen layers and against peft, all in one run.

    python -m model.delta bench --output bench.json

cases.py    the sizes, chains of layers with and without deltas, the check that sides agree
measure.py  passes in turn, medians, ratios with their intervals
table.py    the tables on the console
command.py  the sub-command: options, environment, JSON

Like model/delta/command it is part of the command, and may import what eval may.
"""
