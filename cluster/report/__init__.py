"""Pages about rows of an evaluation and the stores behind them: pure functions to text."""
