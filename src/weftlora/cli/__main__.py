"""`python -m weftlora.cli`, for launchers that start modules: `accelerate launch -m weftlora.cli train recipe.yaml`."""

from weftlora.cli import main

main()
