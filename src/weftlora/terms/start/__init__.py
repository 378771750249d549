"""The values at step 0 of A and B, and the frozen slots that undo them."""
