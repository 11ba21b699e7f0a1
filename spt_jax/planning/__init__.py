"""What a run would take on hardware that is not here: memory, time, and what to change where it does not fit."""
