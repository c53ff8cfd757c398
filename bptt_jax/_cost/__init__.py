"""The cost of a plan in bytes, evaluations and time: pure functions of the sizes of one step."""
