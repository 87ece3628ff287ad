"""One module a study: a `Config`, `run()` of stages, and a report."""
