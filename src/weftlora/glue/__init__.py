"""Where weftlora meets peft: registration, the tuner, sharing between sites."""
