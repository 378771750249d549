"""Which adapter for my task and budget: methods trained side by side on the same seeds, and what can be said of them."""
