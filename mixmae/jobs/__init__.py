"""What a run trains: each kind of run as its workers see it, and its config."""
