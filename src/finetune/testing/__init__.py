"""What tests of fine-tuning need: tiny models, and the validators."""
