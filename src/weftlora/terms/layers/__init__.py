"""Which blocks are adapted, and how strongly: a scalar per block in g."""
