"""The first stage: from a step to its `StepProfile`, without running or compiling anything."""
