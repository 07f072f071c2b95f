"""Several models in one server: which there are, which are loaded, and which one serves a request.

specs.py has the description of a fleet, read from a models file; model.py one model and its engines; memory.py the
budget; split.py A/B splits; fleet.py all of them by name.
"""
