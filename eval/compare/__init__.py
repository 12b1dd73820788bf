"""python -m eval.compare: runs of train.py side by side, as one page."""
