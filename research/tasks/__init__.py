"""What a batch, a loss and a metric are, one task a file."""
