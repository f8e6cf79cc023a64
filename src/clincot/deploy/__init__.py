"""From a checkpoint that won to an endpoint that answers: publish, point, roll out, roll back."""
