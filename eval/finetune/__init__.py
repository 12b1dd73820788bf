"""Fine-tuning of a pre-trained model on downstream tasks, whole or by a delta, and its scores."""
