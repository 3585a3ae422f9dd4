"""Commands that measure, each writing JSON under benchmarks/results/ and printing a table."""
