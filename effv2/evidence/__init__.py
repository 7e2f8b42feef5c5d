"""Evidence from tracked runs: statistics, verdicts, tables, figures and reports. This room never trains."""
