"""`largest_budget`, the budget with which a whole program fits on a device."""
