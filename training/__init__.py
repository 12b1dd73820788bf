"""What the training loop of train.py is made of."""
