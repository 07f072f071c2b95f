"""The engine: scheduler, step plans, and the loop of schedule, execute, sample, emit."""
