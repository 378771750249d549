"""`python -m weftlora`, also for launchers that start modules: `accelerate launch -m weftlora train recipe.yaml`."""

from weftlora.cli import main

main()
