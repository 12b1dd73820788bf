"""The benchmark of the training system: every comparison has both sides in one run, in turn.

    python -m training.bench all --output results.json

step.py          a training step of the vanilla model against transformers' Llama
hugging_face.py  that Llama with our weights
ddp.py           the engine on two ranks against DistributedDataParallel
ddp_rank.py      what a rank of it runs
loop.py          train.py against the least loop with DeepSpeed
minimal_loop.py  that loop
lpa.py           LPA against vanilla: how much of the saved FLOPs is saved time
startup.py       from the start of the process to the end of the first optimizer step
loader.py        batches from the page cache
measure.py       repeats in turn, medians, ratios with their intervals, the check of the losses
corpus.py        the embedded corpus, prepared
processes.py     programs that are measured from outside
profiling.py     where the time of a step goes
page.py          the tables, on the console and in docs/performance.md
"""
