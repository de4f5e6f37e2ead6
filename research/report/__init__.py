"""What a network costs and how a run went: FLOPs, latency, memory, tables, plots and the run card."""
