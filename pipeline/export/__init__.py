"""Export: what an experiment's heads can be made into: bundles, estimators of scikit-learn, and files for other programs."""
