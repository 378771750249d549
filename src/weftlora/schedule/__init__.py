"""What happens when: controllers that measure, decide and apply, driven by optimiser steps that nobody has to count."""
