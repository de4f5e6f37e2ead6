"""What the benchmark times: cases, how they are measured, the thresholds that they are judged by, the peers beside
them."""
