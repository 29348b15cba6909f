"""Training: models with `fit`, its progress line and its history."""
