"""The page of a comparison: verdict first, every number linked to the runs it comes from."""
