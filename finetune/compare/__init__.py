"""Which reward should I train on? Trainings side by side, judged, and what follows by fixed rules."""
