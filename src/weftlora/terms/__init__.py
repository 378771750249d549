"""The terms of the equation. Each file is one term: its equation, its choice and a thin module. Terms never import
each other; `weftlora.site` is the only place that sees them together."""
