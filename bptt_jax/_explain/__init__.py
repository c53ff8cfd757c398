"""`explain` and `profile`: the plan that a budget gets, as a report."""
