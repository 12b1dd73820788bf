"""Studies: arms × learning rates × seeds, run to the end and put on a page."""
