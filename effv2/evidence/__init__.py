"""Evidence from tracked runs: statistics, verdicts, tables, figures and reports. This package never trains."""
