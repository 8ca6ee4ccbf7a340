"""`septet bench`: workloads, engines over HTTP, figures with intervals, a report. Each file says what it owns."""
