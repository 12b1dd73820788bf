"""python -m eval.analysis: singular spectra of attention and FFN over training, as one page."""
