"""What every data format is made of: faults, the vocabulary of fields, turns, questions and answers."""
