"""What is in the data, for people: validation, estimates before any work, one sample in full."""
