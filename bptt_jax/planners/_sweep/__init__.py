"""The planner of sweeps: at most two nests of loops and a kept rest."""
