"""Who owns A and B, the router ω, and the vectors u and v."""
