"""The ELBO, its schedules and its anti-collapse terms: torch only."""
