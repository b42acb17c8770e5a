"""The tests of graphopt: helpers are imported as ``tests._name``."""
