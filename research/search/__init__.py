"""Which sub-network to take: selection under budgets."""
