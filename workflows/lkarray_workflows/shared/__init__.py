"""What several studies need: data, sampling, recorded runs, attacks, retraining."""
