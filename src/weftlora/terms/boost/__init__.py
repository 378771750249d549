"""Extra rank slots along directions of W that the fine-tune is found to need."""
