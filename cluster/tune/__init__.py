"""Tries autoscaling policies on a trace in a simulated cluster, and searches their settings."""
