"""What rank slots are worth: the model with a slot off, and with a slot alone, on validation rows."""
