"""What the benchmark times: cases, how they are measured, the marks that they are judged by, the peers beside them."""
