"""Which backends an op trusts, what is stored of that, and by what it is stored."""
