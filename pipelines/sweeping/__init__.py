"""The parts of a sweep: its trials, what came of them, what it says meanwhile."""
