"""One typed configuration: schema, loading, cross-field checks."""
