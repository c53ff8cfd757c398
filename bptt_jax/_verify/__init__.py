"""Checks of plans by the compiler: temporary bytes of a gradient, and the search for the fastest plan that fits."""
