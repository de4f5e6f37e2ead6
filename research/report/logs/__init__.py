"""What a report makes of the logs of layers: a reader for each heading that has more to say than its numbers."""
