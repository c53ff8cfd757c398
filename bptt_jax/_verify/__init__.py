"""The compiler's word on a plan: the temporary bytes of the gradient, and the search for the fastest plan that fits."""
