"""Where weftlora meets peft: registration, the tuner, schedules for its models, stock LoRA, adapters of released code."""
