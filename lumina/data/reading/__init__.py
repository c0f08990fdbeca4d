"""Files -> numbered records: containers, compression, encodings, JSON however it is laid out, tables."""
