"""`python -m weft.cli`, for launchers that start modules: `accelerate launch -m weft.cli train recipe.yaml`."""

from weft.cli import main

main()
