"""Where weft meets peft: registration, the tuner, sharing between sites."""
