"""The functions behind `import effv2`, one per command, and their results."""
