"""python -m model.delta: what it does with files. Unlike the rest of model/delta it knows our
checkpoints.
"""
