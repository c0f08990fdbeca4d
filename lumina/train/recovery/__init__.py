"""What a run does about trouble: the spike detector, and which way it goes on."""
