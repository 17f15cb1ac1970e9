"""Benchmarks: methods against each other, the parts of a cycle, the quality of quantised models; reports and plots."""
