"""The functions behind `import effv2`, one a command, and what they return."""
