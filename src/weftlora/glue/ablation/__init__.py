"""Measuring rank slots on validation rows: the model with a slot off, and with a slot alone."""
