"""The call of a scan as a value: its flat step, its axes of time, and the gradient that is asked for."""
