"""A run is a folder: its recipe, its base, its adapter, its record."""
