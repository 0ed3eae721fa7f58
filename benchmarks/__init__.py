"""What veneer costs, side by side with PEFT and with the frozen model: `python -m benchmarks`."""
