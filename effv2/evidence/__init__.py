"""What tracked runs show: tables, figures, comparisons. Never trains."""
