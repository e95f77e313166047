"""A table of results: rows of one configuration, trained, evaluated and written as they come."""
