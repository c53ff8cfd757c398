"""One step taken apart for the sweep: features of x, the loop, taps of weights, and its backward. It knows no plan."""
