"""Neural networks with structured layers: layers, models, data, training and the command line."""
