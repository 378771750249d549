"""weft: adaptive low-rank adapters as one equation with five axes."""
