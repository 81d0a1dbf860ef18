"""One module for each kind of device: loss and gradient in one pass over the data."""
