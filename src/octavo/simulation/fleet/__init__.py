"""Simulation of many engines behind many frontends, with failures and autoscaling, in virtual time."""
