"""What other stacks plug in: one module a stack, imported by its name and by nothing else here."""
