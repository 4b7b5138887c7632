"""What leaves an experiment: bundles, a fitted head each with all that is needed to use it."""
