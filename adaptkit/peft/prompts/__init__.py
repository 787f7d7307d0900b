"""Prompt tuning, P-tuning and prefix tuning under PEFT's names. The tokens are put in place by `live.virtual`."""
