"""`explain`, a report on the plan for a budget, and `profile`, the bytes of one step."""
