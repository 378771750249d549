"""Which rank slots are live: a 0/1 mask in g."""
